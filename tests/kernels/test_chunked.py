"""The chunk form against the reference: forward, state, every gradient."""

import itertools

import pytest
import torch

from atlas_kernels import Gates, MemoryRule, chunked, omega_memory
from atlas_kernels.chunked import cut
from atlas_kernels.decays import decay_matrix, pair_band, source_band, sum_by_doubling
from atlas_kernels.gelu import gelu, gelu_with_derivative
from tests.support.problems import TOLERANCE, assert_close, compare, gradients, problem, relative_rms, state_tensors

CHUNK = 8
MEMORIES = [("linear", "none"), ("mlp", "none"), ("mlp", "layer")]
WRITES = [(0, 1), (1, 1), (5, 1), (5, CHUNK // 4), (5, CHUNK)]  # (ns_steps, ns_period)


@pytest.mark.parametrize("ns_steps,ns_period", WRITES)
@pytest.mark.parametrize("memory,norm", MEMORIES)
@pytest.mark.parametrize("pair", [True, False], ids=["pair", "source"])
def test_lengths_and_windows(memory, norm, ns_steps, ns_period, pair, monkeypatch):
    monkeypatch.setattr(chunked, "HELD_BYTES", 0)  # as long sequences are computed
    for tokens, window in itertools.product([1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 3], [1, 3, CHUNK, CHUNK + 3]):
        rule = MemoryRule(memory, window=window, chunk=CHUNK, ns_steps=ns_steps, ns_period=ns_period, norm=norm)
        compare(problem(rule, tokens, pair=pair, seed=tokens))


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("ns_steps", [0, 5])
@pytest.mark.usefixtures("backward")
def test_separate_residual_and_unequal_widths(norm, ns_steps):
    rule = MemoryRule(window=4, chunk=CHUNK, ns_steps=ns_steps, norm=norm, ns_coefficients="polar_express")
    compare(problem(rule, 21, residual=True, key=7, value=5, hidden=11))
    rule = MemoryRule("linear", window=4, chunk=CHUNK, ns_steps=ns_steps)
    compare(problem(rule, 21, key=7, value=5))


@pytest.mark.parametrize("ns_steps", [0, 5])
@pytest.mark.usefixtures("backward")
def test_awkward_lengths_in_float32(ns_steps):
    for tokens in (63, 75):
        rule = MemoryRule(window=16, chunk=32, ns_steps=ns_steps, ns_period=16 if ns_steps else 1, norm="layer")
        compare(problem(rule, tokens, key=8, value=8, hidden=32, dtype=torch.float32, batch=1))


@pytest.mark.parametrize("ns_period", [1, CHUNK])
def test_without_momentum_theta_says_nothing(ns_period):
    rule = MemoryRule(window=3, chunk=CHUNK, momentum=False, ns_steps=3, ns_period=ns_period, norm="layer")
    compare(problem(rule, 2 * CHUNK + 3))


def test_bfloat16_inputs_are_computed_in_float32():
    p = problem(MemoryRule(window=3, chunk=CHUNK, ns_steps=0), 20, dtype=torch.float32)
    low = [t.detach().bfloat16() for t in (p.q, p.k, p.v)]
    y, state = omega_memory(*low, p.gates, p.weights, p.rule)
    assert y.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in state.tensors())
    exact, _ = omega_memory(*(t.float() for t in low), p.gates, p.weights, p.rule)
    assert torch.equal(y, exact.bfloat16())


@pytest.mark.parametrize("ns_steps,ns_period", [(0, 1), (5, 1), (5, CHUNK)])
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_any_cut_gives_the_whole(impl, ns_steps, ns_period):
    """op(prefix) then op(suffix, state) = op(whole), in and between chunks, with every gradient."""
    rule = MemoryRule(window=5, chunk=CHUNK, ns_steps=ns_steps, ns_period=ns_period, norm="layer")
    for pair, residual in ((True, False), (False, True)):
        p = problem(rule, 2 * CHUNK + 5, pair=pair, residual=residual)
        y, state = p.run(impl)
        whole = {"y": y, **state_tensors(state)}
        whole |= gradients(list(whole.values()), p.leaves())
        for at in (1, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 4):
            first, middle = p.run(impl, 0, at)
            second, state = p.run(impl, at, None, middle)
            assert state.position == y.shape[1]
            parts = {"y": torch.cat([first, second], 1), **state_tensors(state)}
            assert_close(parts | gradients(list(parts.values()), p.leaves()), whole)


def test_decoding_one_token_at_a_time():
    p = problem(MemoryRule(window=5, chunk=CHUNK, ns_steps=5, ns_period=2, norm="layer"), 2 * CHUNK + 3)
    whole, _ = p.run("chunked")
    state, tokens = None, []
    with torch.no_grad():
        for t in range(2 * CHUNK + 3):
            y, state = p.run("chunked", t, t + 1, state)
            tokens.append(y)
    assert relative_rms(torch.cat(tokens, 1), whole) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("ns_steps,ns_period", [(0, 1), (5, 4)])
@pytest.mark.usefixtures("backward")
def test_the_states_own_gradients(ns_steps, ns_period):
    """Gradients with respect to an incoming state, cut inside a chunk, agree with the reference."""
    rule = MemoryRule(window=5, chunk=CHUNK, ns_steps=ns_steps, ns_period=ns_period, norm="layer")
    p = problem(rule, 3 * CHUNK, pair=False)
    _, start = p.run("reference", 0, CHUNK + 3)
    start = start.map(lambda t: t.detach().clone().requires_grad_())
    results = {}
    for impl in ("reference", "chunked"):
        y, state = p.run(impl, CHUNK + 3, None, start)
        results[impl] = gradients([y, *state.tensors()], state_tensors(start))
    assert_close(results["chunked"], results["reference"])
    assert all(g.abs().max() > 0 for g in results["reference"].values())


@pytest.mark.parametrize("ns_steps,ns_period", [(0, 1), (5, CHUNK)])
def test_causal_to_the_bit(ns_steps, ns_period):
    rule = MemoryRule(window=5, chunk=CHUNK, ns_steps=ns_steps, ns_period=ns_period, norm="layer")
    p = problem(rule, 4 * CHUNK)
    before, _ = p.run("chunked")
    for t in (0, 5, CHUNK, 2 * CHUNK + 3):
        changed = problem(rule, 4 * CHUNK)
        with torch.no_grad():
            for leaf in (changed.q, changed.k, changed.v, *vars(changed.gates).values()):
                leaf[:, t] *= 0.5
        after, _ = changed.run("chunked")
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


def test_gates_of_exactly_zero():
    """A forgotten memory, a dropped momentum: exact values and finite gradients."""
    rule = MemoryRule(window=3, chunk=CHUNK, ns_steps=0, norm="layer")
    p = problem(rule, 2 * CHUNK + 1)
    with torch.no_grad():
        p.gates.alpha[:, 3::5] = 0.0
        p.gates.theta[:, 2::4] = 0.0
        p.gates.gamma[:, 7] = 0.0
    compare(p)


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_a_running_sum_by_doubling(tokens):
    x = torch.randn(2, 3, tokens, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, tokens, dtype=torch.float64)
    for ours, true in zip(
        *((y, *torch.autograd.grad((y * weight).sum(), x)) for y in (sum_by_doubling(x), x.cumsum(-1))), strict=True
    ):
        torch.testing.assert_close(ours, true, rtol=1e-12, atol=1e-12)


def test_decay_matrix_with_zeros():
    gate = torch.tensor([0.5, 0.0, 0.9, 1.0, 0.0, 0.3], dtype=torch.float64, requires_grad=True)
    zero = gate.new_zeros(())
    rows = [[gate[s + 1 : t + 1].prod() if s <= t else zero for s in range(6)] for t in range(6)]
    naive = torch.stack([torch.stack(row) for row in rows])
    torch.testing.assert_close(decay_matrix(gate), naive, rtol=1e-12, atol=1e-14)
    weight = torch.arange(36, dtype=torch.float64).view(6, 6)
    expected = torch.autograd.grad((naive * weight).sum(), gate)[0]
    actual = torch.autograd.grad((decay_matrix(gate) * weight).sum(), gate)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_bands():
    C, W = 5, 3
    gamma = torch.arange(C * W, dtype=torch.float64).view(C, W) + 1
    source = torch.arange(C + W - 1, dtype=torch.float64) + 1
    pair, by_source = pair_band(gamma), source_band(source, C)
    for t, i in itertools.product(range(C), range(C + W - 1)):
        age = t - (i - (W - 1))
        assert pair[t, i] == (gamma[t, age] if 0 <= age < W else 0)
        assert by_source[t, i] == (source[i] if 0 <= age < W else 0)


def test_fused_gelu_against_torch():
    z = torch.linspace(-8, 8, 201, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.gelu(z, approximate="tanh")
    (slope,) = torch.autograd.grad(expected.sum(), z, create_graph=True)
    (curvature,) = torch.autograd.grad((slope * z.detach()).sum(), z, retain_graph=True)
    h, dh = gelu_with_derivative(z)
    torch.testing.assert_close(gelu(z), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dh, slope, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(gelu(z).sum(), z)[0], slope, rtol=1e-12, atol=1e-14)
    actual = torch.autograd.grad((dh * z.detach()).sum(), z)[0]
    torch.testing.assert_close(actual, curvature, rtol=1e-11, atol=2e-12)  # O(1) terms cancel


def test_segments_are_about_the_square_root():
    for tokens in (64, 1024, 4096, 65536):
        pieces = cut(0, tokens, 64)
        chunks = tokens // 64
        assert sum(n * c for n, c in pieces) == tokens
        assert max(n for n, _ in pieces) <= chunks**0.5 + 1 and len(pieces) <= chunks**0.5 + 2
    assert cut(70, 200, 64) == [(1, 58), (1, 64), (1, 64), (1, 14)]
    assert cut(70, 5, 64) == [(1, 5)]


def test_gates_outside_their_range_are_named():
    p = problem(MemoryRule(window=3, chunk=CHUNK), 4)
    gates = Gates(p.gates.alpha * 1.5, p.gates.eta, p.gates.theta, p.gates.gamma)
    with pytest.raises(ValueError, match=r"gates.alpha spans .*must lie in \[0, 1\]"):
        gates.check_values()
    p.gates.check_values()
