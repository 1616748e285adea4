"""The exponential kernel in dual form: against sources written out, a long Taylor series, softmax attention."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from atlas_kernels import Gates, MemoryRule, chunked, omega_memory
from atlas_kernels.reference_dual import omega_memory_dual_reference
from tests.support.problems import TOLERANCE, assert_close, gradients, problem, relative_rms, state_tensors

CHUNK = 4
MEMORIES = [("linear", "none"), ("mlp", "none"), ("mlp", "layer"), ("gated_mlp", "layer")]


def rule_of(memory="mlp", norm="layer", loss="l2", window=3, kernel="exponential", chunk=CHUNK):
    return MemoryRule(memory, loss, window, chunk, momentum=False, ns_steps=0, norm=norm, kernel=kernel)


@pytest.mark.parametrize("kernel", ["exponential", "softmax"])
@pytest.mark.parametrize("loss", ["l2", "dot"])
@pytest.mark.parametrize("memory,norm", MEMORIES)
def test_reference_is_the_dual_form(memory, norm, loss, kernel):
    # Of one token under softmax the weight cancels: its gradient is rounding alone.
    shortest = 2 if kernel == "softmax" else 1
    for tokens, window, pair in itertools.product([shortest, CHUNK, 2 * CHUNK + 1], [1, CHUNK + 2], [True, False]):
        p = problem(rule_of(memory, norm, loss, window, kernel), tokens, pair=pair, batch=1, heads=2, value=4)
        y = omega_memory_dual_reference(p.rule, p.weights, p.inputs())
        ours, _ = p.run("chunked")
        expected = {"y": y, **gradients([y], p.leaves())}
        assert_close({"y": ours, **gradients([ours], p.leaves())}, expected)


@pytest.mark.parametrize("kernel", ["exponential", "softmax"])
@pytest.mark.parametrize("pair,residual", [(True, False), (False, True)])
def test_any_cut_gives_the_whole(kernel, pair, residual):
    p = problem(rule_of(kernel=kernel, window=6), 2 * CHUNK + 3, pair=pair, residual=residual)
    y, state = p.run("chunked")
    whole = {"y": y, **state_tensors(state)}
    whole |= gradients(list(whole.values()), p.leaves())
    for at in range(1, 2 * CHUNK + 3):
        first, middle = p.run("chunked", 0, at)
        second, state = p.run("chunked", at, None, middle)
        parts = {"y": torch.cat([first, second], 1), **state_tensors(state)}
        assert_close(parts | gradients(list(parts.values()), p.leaves()), whole)


@pytest.mark.parametrize("kernel", ["exponential", "softmax"])
def test_chunks_computed_again_give_the_same(kernel, monkeypatch):
    p = problem(rule_of("gated_mlp", kernel=kernel), 3 * CHUNK + 1)
    results = []
    for held in (chunked.HELD_BYTES, 0):
        monkeypatch.setattr(chunked, "HELD_BYTES", held)
        y, state = p.run("chunked")
        outputs = {"y": y, **state_tensors(state)}
        results.append(outputs | gradients(list(outputs.values()), p.leaves()))
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_a_long_taylor_series_lifted_by_hand(memory):
    """exp(q . k) = sum_i (q . k)^i / i!: an ordinary memory over its terms up to degree 19, in two dimensions."""
    rule = rule_of(memory, "none")
    p = problem(rule, 11, key=2, value=3, residual=memory == "mlp")
    terms = [(i, j) for i, j in itertools.product(range(20), repeat=2) if i + j <= 19]
    factorial = torch.arange(1.0, 20.0, dtype=torch.float64).cumprod(0)
    roots = torch.tensor([1.0, *factorial.tolist()], dtype=torch.float64)

    def lifted(x):
        return torch.stack([x[..., 0] ** i * x[..., 1] ** j / (roots[i] * roots[j]).sqrt() for i, j in terms], -1)

    first = len(p.weights) - 1
    start = list(p.weights)
    start[first] = p.weights[first].new_zeros(*p.weights[first].shape[:2], len(terms))
    start[first][..., [terms.index((1, 0)), terms.index((0, 1))]] = p.weights[first].detach()
    ordinary = MemoryRule(memory, window=3, chunk=CHUNK, momentum=False, ns_steps=0)
    y, _ = omega_memory(lifted(p.q), lifted(p.k), p.v, p.gates, tuple(start), ordinary, residual=p.residual)
    ours, _ = p.run("chunked")
    assert relative_rms(ours, y) < TOLERANCE[torch.float64]


def test_softmax_attention_exactly():
    p = problem(rule_of("linear", "none", "dot", 1, "softmax"), 3 * CHUNK + 2)
    one = torch.ones_like(p.gates.alpha)
    gates = Gates(one, one, p.gates.theta, torch.ones_like(p.gates.gamma))
    y, _ = omega_memory(p.q, p.k, p.v, gates, (torch.zeros_like(p.weights[0]),), p.rule)
    q, k, v = (t.transpose(1, 2) for t in (p.q, p.k, p.v))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0).transpose(1, 2)
    assert relative_rms(y, expected) < TOLERANCE[torch.float64]
    # Scores far beyond exp's range.
    y, _ = omega_memory(2000 * p.q, p.k, p.v, gates, (torch.zeros_like(p.weights[0]),), p.rule)
    expected = F.scaled_dot_product_attention(2000 * q, k, v, is_causal=True, scale=1.0).transpose(1, 2)
    assert relative_rms(y, expected) < TOLERANCE[torch.float64]


def test_without_the_division_it_is_unnormalised():
    p = problem(rule_of("linear", "none", "dot", 1), 3 * CHUNK + 2)
    one = torch.ones_like(p.gates.alpha)
    gates = Gates(one, one, p.gates.theta, torch.ones_like(p.gates.gamma))
    y, _ = omega_memory(p.q, p.k, p.v, gates, (torch.zeros_like(p.weights[0]),), p.rule)
    scores = torch.einsum("bthk,bshk->bhts", p.q, p.k).exp().tril()
    assert relative_rms(y, torch.einsum("bhts,bshv->bthv", scores, p.v)) < TOLERANCE[torch.float64]


def test_momentum_and_newton_schulz_are_refused():
    for fields in ({"ns_steps": 5, "momentum": False}, {"ns_steps": 0, "momentum": True}):
        with pytest.raises(ValueError, match="keeps sources, not matrices"):
            MemoryRule(kernel="exponential", **fields)


def test_a_state_of_another_kernel_is_refused():
    p = problem(rule_of(), 5)
    _, state = p.run("chunked")
    lifted = problem(MemoryRule(window=3, chunk=CHUNK, momentum=False, ns_steps=0, norm="layer"), 5)
    with pytest.raises(ValueError, match="state is a DualState"):
        lifted.run("chunked", state=state)
