"""The reference against autograd, and against formulas written without it."""

import pytest
import torch

from atlas_kernels import Gates, MemoryRule, omega_memory
from atlas_kernels.reference import gelu, inner_gradient, inner_loss
from tests.support.problems import TOLERANCE, assert_close, problem, relative_rms

MEMORIES = [("linear", "none"), ("mlp", "none"), ("mlp", "layer"), ("gated_mlp", "none"), ("gated_mlp", "layer")]


@pytest.mark.parametrize("loss", ["l2", "dot"])
@pytest.mark.parametrize("memory,norm", MEMORIES)
def test_inner_gradient_equals_autograd(memory, norm, loss):
    rule = MemoryRule(memory=memory, norm=norm, loss=loss, window=5)
    p = problem(rule, tokens=5, residual=memory != "linear", key=3, value=4)
    r = p.k if p.residual is None else p.residual[1]
    W = tuple(w.detach().expand(2, *w.shape).clone().requires_grad_() for w in p.weights)
    gamma = p.gates.alpha
    by_hand = inner_gradient(rule, W, p.k, p.v, r, gamma)
    total = (gamma * inner_loss(rule, W, p.k, p.v, r)).sum()
    for hand, auto in zip(by_hand, torch.autograd.grad(total, W), strict=True):
        assert relative_rms(hand, auto) < TOLERANCE[torch.float64]


def test_gelu_is_torchs_and_its_derivative_autograds():
    z = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    h, dh = gelu(z)
    expected = torch.nn.functional.gelu(z, approximate="tanh")
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dh, torch.autograd.grad(expected.sum(), z)[0], rtol=1e-12, atol=1e-14)


def test_delta_rule():
    """c=1, k=0, theta=0, alpha=1, linear, b=1: W += eta (v - W x) x^T, read after the write."""
    p = problem(MemoryRule(memory="linear", window=1, chunk=1, ns_steps=0), tokens=9, value=5)
    ones, zeros = torch.ones_like(p.gates.alpha), torch.zeros_like(p.gates.theta)
    gates = Gates(alpha=ones, eta=p.gates.eta, theta=zeros, gamma=ones.unsqueeze(-1))
    y, state = omega_memory(p.q, p.k, p.v, gates, p.weights, p.rule, impl="reference")
    for b in range(2):
        for h in range(3):
            W = p.weights[0][h]
            for t in range(9):
                W = W + p.gates.eta[b, t, h] * torch.outer(p.v[b, t, h] - W @ p.k[b, t, h], p.k[b, t, h])
                assert relative_rms(y[b, t, h], W @ p.q[b, t, h]) < TOLERANCE[torch.float64]
            assert relative_rms(state.weights[0][b, h], W) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("memory,norm", MEMORIES)
def test_without_gradients_the_memory_only_decays(impl, memory, norm):
    """gamma = 0 and theta = 0: M_t = (prod alpha) M_0, with Newton-Schulz (NS(0) = 0) and without."""
    for ns_steps in (0, 5):
        p = problem(MemoryRule(memory=memory, norm=norm, window=3, chunk=4, ns_steps=ns_steps), tokens=10)
        zero = torch.zeros_like(p.gates.theta)
        gates = Gates(p.gates.alpha, p.gates.eta, zero, torch.zeros_like(p.gates.gamma))
        _, state = omega_memory(p.q, p.k, p.v, gates, p.weights, p.rule, impl=impl)
        retained = p.gates.alpha.prod(1)[..., None, None]
        for w, start in zip(state.weights, p.weights, strict=True):
            assert relative_rms(w, retained * start) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_without_steps_reads_see_the_decayed_start(impl):
    p = problem(MemoryRule(memory="linear", window=3, chunk=4, ns_steps=5), tokens=10)
    gates = Gates(p.gates.alpha, torch.zeros_like(p.gates.eta), p.gates.theta, p.gates.gamma)
    y, _ = omega_memory(p.q, p.k, p.v, gates, p.weights, p.rule, impl=impl)
    retained = p.gates.alpha.cumprod(1).unsqueeze(-1)
    assert relative_rms(y, retained * torch.einsum("hvd,bthd->bthv", p.weights[0], p.q)) < TOLERANCE[torch.float64]


def test_one_token_chunks_are_the_online_rule():
    """b = 1: every gradient at the newest weights; written out with autograd, token by token."""
    rule = MemoryRule(memory="mlp", norm="layer", window=3, chunk=1, ns_steps=0)
    p = problem(rule, tokens=7, batch=1, heads=1)
    y, _ = p.run("reference")
    W = tuple(w.detach()[None].clone() for w in p.weights)
    S = tuple(torch.zeros_like(w) for w in W)
    read = {}
    for t in range(7):
        W = tuple(w.detach().requires_grad_() for w in W)
        loss = sum(
            p.gates.gamma[0, t, 0, j] * inner_loss(rule, W, p.k[:, [t - j]], p.v[:, [t - j]], p.k[:, [t - j]]).sum()
            for j in range(min(3, t + 1))
        )
        G = torch.autograd.grad(loss, W)
        alpha, eta, theta = (g[0, t, 0].item() for g in (p.gates.alpha, p.gates.eta, p.gates.theta))
        S = tuple(theta * s + g for s, g in zip(S, G, strict=True))
        W = tuple(alpha * w - eta * s for w, s in zip(W, S, strict=True))
        z = torch.nn.functional.gelu(p.q[0, t, 0] @ W[1][0, 0].T, approximate="tanh") @ W[0][0, 0].T
        read[f"y[{t}]"] = (p.q[0, t, 0] + torch.nn.functional.layer_norm(z, z.shape)).detach()
    assert_close({f"y[{t}]": y[0, t, 0] for t in range(7)}, read)
