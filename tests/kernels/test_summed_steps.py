"""ns_step="sum": an orthogonalised write's step is the sum of its period's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atlas_kernels import Gates, MemoryRule, initial_state, omega_memory
from tests.support.problems import TOLERANCE, assert_close, compare, gradients, problem, relative_rms, state_tensors

CHUNK = 8
SUMS = MemoryRule(window=5, chunk=CHUNK, ns_steps=3, ns_period=4, ns_step="sum")
RULES = {
    "half a chunk": SUMS,
    "a chunk": replace(SUMS, ns_period=CHUNK, momentum=False),
    "a token": replace(SUMS, ns_period=1),
    "gated": replace(SUMS, memory="gated_mlp", norm="layer"),
    "linear": replace(SUMS, memory="linear", ns_period=2),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("pair", [True, False], ids=["pair", "source"])
@pytest.mark.usefixtures("backward")
def test_chunked_is_the_reference(rule, pair):
    for tokens in (1, 3, CHUNK, 3 * CHUNK + 3):
        compare(problem(rule, tokens, pair=pair))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_any_cut_gives_the_whole(rule, impl):
    p = problem(rule, 2 * CHUNK + 5)
    y, state = p.run(impl)
    whole = {"y": y, **state_tensors(state)}
    whole |= gradients(list(whole.values()), p.leaves())
    for at in (1, 3, 4, CHUNK, CHUNK + 1, CHUNK + 7):
        first, middle = p.run(impl, 0, at)
        middle = middle.from_message(rule, middle.to_message(rule))  # as a rank of a split sequence gets it
        second, state = p.run(impl, at, None, middle)
        parts = {"y": torch.cat([first, second], 1), **state_tensors(state)}
        assert_close(parts | gradients(list(parts.values()), p.leaves()), whole)


def test_decoding_one_token_at_a_time():
    p = problem(SUMS, 2 * CHUNK + 3)
    whole, _ = p.run("chunked")
    state, tokens = None, []
    with torch.no_grad():
        for t in range(2 * CHUNK + 3):
            y, state = p.run("chunked", t, t + 1, state)
            tokens.append(y)
    assert relative_rms(torch.cat(tokens, 1), whole) < TOLERANCE[torch.float64]


def test_it_is_the_last_tokens_step_where_that_is_the_sum():
    """Steps moved to the writing tokens and summed there: the same memory as with ns_step="last"."""
    p = problem(SUMS, 2 * CHUNK)
    eta = p.gates.eta.detach().unflatten(1, (-1, SUMS.ns_period))
    summed = eta.sum(2, keepdim=True).expand_as(eta).flatten(1, 2)
    last = replace(p, rule=replace(SUMS, ns_step="last"), gates=replace(p.gates, eta=summed))
    assert relative_rms(p.run("chunked")[0], last.run("reference")[0]) < TOLERANCE[torch.float64]


def test_a_period_without_steps_writes_nothing():
    """However large its gradients: Newton-Schulz alone would write any of them in full."""
    p = problem(SUMS, CHUNK)
    still = Gates(torch.ones_like(p.gates.alpha), torch.zeros_like(p.gates.eta), p.gates.theta, p.gates.gamma)
    _, state = replace(p, gates=still).run("chunked")
    assert all(torch.equal(after[0], w) for after, w in zip(state.weights, p.weights, strict=True))


def test_what_a_state_holds():
    p = problem(SUMS, 6)
    _, state = p.run("chunked")
    assert torch.allclose(state.pending, p.gates.eta[:, 4:].sum(1))
    # At a write's border nothing is pending, and nothing is handed on.
    _, at_border = p.run("chunked", 0, 4)
    assert not at_border.pending.any() and len(at_border.to_message(SUMS)) == len(state.to_message(SUMS)) - 1
    every = replace(SUMS, ns_period=1)
    assert initial_state(every, p.weights, p.k, p.v, residuals=False, source_gates=False).pending is None


def test_a_state_of_another_rule_is_refused():
    p = problem(SUMS, 6)
    _, state = replace(p, rule=replace(SUMS, ns_step="last")).run("chunked")
    with pytest.raises(ValueError, match="state.pending is missing; .*ns_step"):
        omega_memory(p.q, p.k, p.v, p.gates, p.weights, SUMS, state=state)
    with pytest.raises(ValueError, match="ns_step='mean' is unknown; choose one of last, sum"):
        replace(SUMS, ns_step="mean")
