"""The family of memories: every member reference = chunked, and the special cases against formulas of their own."""

import itertools

import pytest
import torch

from atlas_kernels import Gates, MemoryRule, chunked, delta_rule, omega_memory
from atlas_kernels.reference import inner_loss
from tests.support.problems import TOLERANCE, assert_close, compare, gradients, problem, relative_rms, state_tensors

CHUNK = 8
DEEP = [{"memory": memory, "norm": norm} for memory in ("mlp", "gated_mlp") for norm in ("none", "layer")]
# Without momentum, with it, and orthogonalised.
WRITES = [{"ns_steps": 0, "momentum": False}, {"ns_steps": 0}, {"ns_period": 4}]


@pytest.mark.parametrize("writes", WRITES, ids=["sum", "momentum", "orthogonal"])
@pytest.mark.parametrize("loss", ["l2", "dot"])
@pytest.mark.parametrize("memory", [{"memory": "linear"}, *DEEP], ids=lambda m: "-".join(m.values()))
def test_reference_is_chunked(memory, loss, writes, monkeypatch):
    for held in (0, chunked.HELD_BYTES):
        monkeypatch.setattr(chunked, "HELD_BYTES", held)
        for tokens, window in itertools.product([CHUNK - 1, 2 * CHUNK + 3], [1, CHUNK + 3]):
            rule = MemoryRule(**memory, loss=loss, **writes, window=window, chunk=CHUNK)
            compare(problem(rule, tokens, pair=tokens % 2 == 0))


@pytest.mark.parametrize("writes", WRITES, ids=["sum", "momentum", "orthogonal"])
@pytest.mark.parametrize("loss", ["l2", "dot"])
def test_any_cut_gives_the_whole(loss, writes):
    p = problem(MemoryRule("gated_mlp", loss, 5, CHUNK, norm="layer", **writes), 2 * CHUNK + 5, residual=True)
    y, state = p.run("chunked")
    whole = {"y": y, **state_tensors(state)}
    whole |= gradients(list(whole.values()), p.leaves())
    for at in (3, CHUNK, 2 * CHUNK + 1):
        first, middle = p.run("chunked", 0, at)
        second, state = p.run("chunked", at, None, middle)
        parts = {"y": torch.cat([first, second], 1), **state_tensors(state)}
        assert_close(parts | gradients(list(parts.values()), p.leaves()), whole)


def fixed(p, **gates):
    """The problem's gates with some set to one number."""
    own = vars(p.gates)
    return Gates(**{name: torch.full_like(own[name], gates[name]) if name in gates else own[name] for name in own})


def test_a_linear_memory_with_the_dot_loss_is_gated_linear_attention():
    """M_t = alpha_t M_{t-1} + eta_t v_t k_t^T: linear attention with alpha = 1."""
    for alpha in (1.0, None):
        p = problem(MemoryRule("linear", "dot", 1, CHUNK, ns_steps=0, momentum=False), 21)
        gates = fixed(p, gamma=1.0, **({"alpha": alpha} if alpha else {}))
        y, _ = omega_memory(p.q, p.k, p.v, gates, (torch.zeros_like(p.weights[0]),), p.rule, impl="chunked")
        logs = gates.alpha.log().cumsum(1).transpose(1, 2)
        decay = (logs[..., :, None] - logs[..., None, :]).exp().tril()
        scores = torch.einsum("bthk,bshk->bhts", p.q, p.k) * decay * gates.eta.transpose(1, 2)[..., None, :]
        assert relative_rms(y, torch.einsum("bhts,bshv->bthv", scores, p.v)) < TOLERANCE[torch.float64]


def test_titans_equations_12_and_13():
    """S_t = theta_t S_{t-1} - eta_t grad, M_t = alpha_t M_{t-1} + S_t: eta as gamma, and a step of one."""
    rule = MemoryRule("mlp", "l2", 1, 1, ns_steps=0, norm="layer")
    p = problem(rule, 7, batch=1, heads=1)
    gates = Gates(p.gates.alpha, torch.ones_like(p.gates.eta), p.gates.theta, p.gates.eta.unsqueeze(-1))
    for impl in ("reference", "chunked"):
        _, state = omega_memory(p.q, p.k, p.v, gates, p.weights, rule, impl=impl)
        W = tuple(w.detach()[None].clone() for w in p.weights)
        S = tuple(torch.zeros_like(w) for w in W)
        for t in range(7):
            W = tuple(w.detach().requires_grad_() for w in W)
            G = torch.autograd.grad(inner_loss(rule, W, p.k[:, [t]], p.v[:, [t]], p.k[:, [t]]).sum(), W)
            alpha, eta, theta = (g[0, t, 0].item() for g in (p.gates.alpha, p.gates.eta, p.gates.theta))
            S = tuple(theta * s - eta * g for s, g in zip(S, G, strict=True))
            W = tuple(alpha * w + s for w, s in zip(W, S, strict=True))
        for ours, theirs in zip(state.weights, W, strict=True):
            assert relative_rms(ours, theirs) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("pair", [True, False])
def test_the_delta_rule_in_products(pair, monkeypatch):
    """The blocks of the (gated) delta rule against the reference: lengths around a block, both ways of the backward."""
    monkeypatch.setattr(delta_rule, "BLOCK", 8)
    for held_every in (1, 16):
        monkeypatch.setattr(delta_rule, "HELD_EVERY", held_every)
        for tokens in (1, 7, 8, 9, 27):
            rule = MemoryRule("linear", window=1, chunk=1, ns_steps=0, momentum=False)
            assert rule.delta
            compare(problem(rule, tokens, pair=pair, value=5))


def test_the_delta_rule_over_any_cut():
    p = problem(MemoryRule("linear", window=1, chunk=1, ns_steps=0, momentum=False), 75)
    y, state = p.run("chunked")
    first, middle = p.run("chunked", 0, 30)
    second, after = p.run("chunked", 30, None, middle)
    assert_close({"y": torch.cat([first, second], 1), **state_tensors(after)}, {"y": y, **state_tensors(state)})


def test_gated_deltanet():
    """S_t = alpha_t S_{t-1} (I - beta k k^T) + beta_t v_t k_t^T (arXiv 2412.06464), whose step acts after the decay."""
    p = problem(MemoryRule("linear", window=1, chunk=1, ns_steps=0, momentum=False), 19, batch=1, heads=1)
    beta = p.gates.theta
    gates = Gates(p.gates.alpha, beta * p.gates.alpha, p.gates.theta, torch.ones_like(p.gates.gamma))
    values = p.v / p.gates.alpha.unsqueeze(-1)
    y, _ = omega_memory(p.q, p.k, values, gates, p.weights, p.rule, impl="chunked")
    S, eye = p.weights[0][0], torch.eye(4, dtype=torch.float64)
    for t in range(19):
        k, v, b = p.k[0, t, 0], p.v[0, t, 0], beta[0, t, 0]
        S = p.gates.alpha[0, t, 0] * S @ (eye - b * torch.outer(k, k)) + b * torch.outer(v, k)
        assert relative_rms(y[0, t, 0], S @ p.q[0, t, 0]) < TOLERANCE[torch.float64]
