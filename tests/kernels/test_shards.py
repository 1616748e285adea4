"""A memory that begins anew every shard (`rule.shard`; TNT, arXiv 2511.07343 Eq 6): chunked against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atlas_kernels import MemoryRule, delta_rule, initial_state, omega_memory, op
from tests.kernels.test_packing import positions_of, run
from tests.support.problems import (
    TOLERANCE,
    Problem,
    assert_close,
    compare,
    gradients,
    problem,
    relative_rms,
    state_tensors,
)

CHUNK, SHARD = 4, 8
PLAIN = MemoryRule("mlp", window=3, chunk=CHUNK, shard=SHARD, ns_steps=0, norm="layer")
RULES = {
    "titans": PLAIN,
    "omeganet": replace(PLAIN, momentum=False),
    "gated": replace(PLAIN, memory="gated_mlp", norm="none"),
    "dot, wide window": replace(PLAIN, loss="dot", window=CHUNK + 3, norm="none", momentum=False),
    "linear": replace(PLAIN, memory="linear", norm="none"),
    "atlas": replace(PLAIN, ns_steps=3, ns_period=2, norm="none"),
    "atlas, once a chunk": replace(PLAIN, ns_steps=3, ns_period=CHUNK, norm="none", momentum=False),
    "atlas++": replace(PLAIN, memory="gated_mlp", ns_steps=3, ns_period=1, norm="none"),
    "summed steps": replace(PLAIN, ns_steps=3, ns_period=CHUNK, ns_step="sum", norm="none"),
    "first order": replace(PLAIN, anchor_gradient=0.0),
    "damped": replace(PLAIN, ns_steps=3, ns_period=2, norm="none", anchor_gradient=0.5),
    "stale reads": replace(PLAIN, read="chunk"),
    "delta rule": MemoryRule("linear", window=1, chunk=1, shard=SHARD, momentum=False, ns_steps=0),
}
LENGTHS = (1, SHARD - 1, SHARD, SHARD + 1, 2 * SHARD + 3)
PACKED = [[3, 1, 9, 8], [13, 8]]
TOKENS = 21


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(delta_rule, "BLOCK", 4)


def with_gradients(p: Problem, y: torch.Tensor, state) -> dict[str, torch.Tensor]:
    found = {"y": y, **state_tensors(state)}
    return found | gradients(list(found.values()), p.leaves())


@pytest.mark.parametrize("pair", [True, False], ids=["pair", "source"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_chunked_is_the_reference(rule, pair):
    for tokens in LENGTHS:
        compare(problem(rule, tokens, pair=pair, heads=2, batch=1, seed=tokens))


@pytest.mark.parametrize("ns_steps", [0, 3])
@pytest.mark.usefixtures("backward")
def test_every_way_of_the_backward_and_a_residual_of_its_own(ns_steps):
    rule = replace(PLAIN, ns_steps=ns_steps)
    compare(problem(rule, 2 * SHARD + 3, pair=False, residual=True, key=5, value=3, hidden=7, heads=1))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_reference_itself_reads_each_shard_as_a_sequence(rule):
    """Eq 6: a shard is what a memory without shards answers to its tokens alone."""
    p = problem(rule, 2 * SHARD + 3, pair=False, heads=2, batch=1)
    y, state = p.run("reference")
    endless = replace(p, rule=replace(rule, shard=0))
    alone = [endless.run("reference", t, t + SHARD) for t in range(0, 2 * SHARD + 3, SHARD)]
    expected = with_gradients(p, torch.cat([part for part, _ in alone], 1), alone[-1][1])
    assert_close(with_gradients(p, y, state), expected)
    assert state.position == 2 * SHARD + 3


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_any_cut_gives_the_whole(rule, impl):
    p = problem(rule, 2 * SHARD + 2, pair=impl == "reference", heads=1, batch=1)
    whole = with_gradients(p, *p.run(impl))
    for at in (3, SHARD, SHARD + 1, SHARD + CHUNK):
        first, middle = p.run(impl, 0, at)
        second, state = p.run(impl, at, None, middle)
        assert state.position == 2 * SHARD + 2
        assert_close(with_gradients(p, torch.cat([first, second], 1), state), whole)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_decoding_one_token_at_a_time(rule):
    p = problem(rule, SHARD + 5, heads=2, batch=1)
    whole, _ = p.run("chunked")
    state, tokens = None, []
    with torch.no_grad():
        for t in range(SHARD + 5):
            y, state = p.run("chunked", t, t + 1, state)
            tokens.append(y)
    assert relative_rms(torch.cat(tokens, 1), whole) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("at", [3, SHARD - 2, SHARD, SHARD + 3])
@pytest.mark.parametrize("rule", [RULES["titans"], RULES["summed steps"], RULES["stale reads"]])
def test_the_states_own_gradients(rule, at):
    """An incoming state inside a shard gets them until the shard's end; one at its end gets none."""
    p = problem(rule, 3 * SHARD, pair=False, heads=2)
    _, begun = p.run("reference", 0, at)
    begun = begun.map(lambda t: t.detach().clone().requires_grad_())
    results = {}
    for impl in ("reference", "chunked"):
        y, state = p.run(impl, at, None, begun)
        results[impl] = gradients([y, *state.tensors()], state_tensors(begun))
    assert_close(results["chunked"], results["reference"])
    assert any(g.any() for g in results["reference"].values()) == (at % SHARD > 0)


@pytest.mark.parametrize("pair,residual", [(True, False), (False, True)])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_packed_documents(rule, pair, residual):
    """A document's shards lie at its own positions: each document is what it is alone, in every implementation."""
    p = problem(rule, TOKENS, pair=pair, residual=residual and rule.memory != "linear", heads=1)
    positions = positions_of(PACKED)
    found = {impl: with_gradients(p, *run(p, impl, positions)) for impl in ("reference", "chunked")}
    assert_close(found["chunked"], found["reference"])
    for row, lengths in enumerate(PACKED):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        alone = [p.run("reference", end - n, end)[0][row] for n, end in zip(lengths, ends, strict=True)]
        assert relative_rms(found["reference"]["y"][row], torch.cat(alone)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_packed_documents_cut_anywhere(rule):
    p = problem(rule, TOKENS, pair=False, heads=1)
    positions = positions_of(PACKED)
    whole = with_gradients(p, *run(p, "chunked", positions))
    for at in (3, 8, 12, 17):  # between documents, at a shard's end, and inside one
        first, middle = run(p, "chunked", positions, None, slice(0, at))
        second, state = run(p, "chunked", positions, middle, slice(at, None))
        assert state.position.tolist() == [8, 8]
        assert_close(with_gradients(p, torch.cat([first, second], 1), state), whole)
        on, _ = run(p, "reference", positions, middle, slice(at, None))
        assert relative_rms(on, whole["y"][:, at:]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_packed_state_goes_on_without_positions(rule):
    p = problem(rule, 35, heads=1)
    positions = positions_of([[3, 32], [20, 15]])
    with torch.no_grad():
        y, _ = run(p, "chunked", positions)
        _, middle = run(p, "chunked", positions, None, slice(0, 23))
        rest, _ = p.run("chunked", 23, None, middle)
    assert_close({"y": rest}, {"y": y[:, 23:]})


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@torch.no_grad()
def test_a_token_is_seen_by_its_own_shard_alone(rule):
    """Its window and its writes end with the shard: what others answer stays bit-identical."""
    before, _ = problem(rule, 3 * SHARD, heads=2).run("chunked")
    changed = problem(rule, 3 * SHARD, heads=2)
    at = 2 * SHARD - 2  # the next shard's first windows would reach it
    for leaf in (changed.q, changed.k, changed.v, *vars(changed.gates).values()):
        leaf[:, at] *= 0.5
    after, _ = changed.run("chunked")
    own = slice(SHARD, 2 * SHARD)
    same = [slice(0, SHARD), slice(SHARD, at), slice(2 * SHARD, None)]
    assert all(torch.equal(after[:, part], before[:, part]) for part in same)
    assert not torch.equal(after[:, own], before[:, own])


def test_the_last_tokens_state_still_answers_for_its_shard():
    """A state at a shard's end holds what the shard wrote; the next token alone begins anew."""
    p = problem(PLAIN, 2 * SHARD, heads=2)
    _, state = p.run("chunked", 0, SHARD)
    _, alone = replace(p, rule=replace(PLAIN, shard=0)).run("chunked", 0, SHARD)
    assert_close(state_tensors(state), state_tensors(alone))
    after, _ = p.run("chunked", SHARD, None, state)
    start = initial_state(PLAIN, p.weights, p.k, p.v, residuals=False, source_gates=False)
    fresh, _ = p.run("chunked", SHARD, None, start.at(SHARD))
    assert torch.equal(after, fresh)


def test_start_weights_learn_from_every_shard():
    """Their gradient is the sum of what each shard gives them."""
    p = problem(PLAIN, 3 * SHARD, heads=2)
    whole = torch.autograd.grad(p.run("chunked")[0].sum(), p.weights)
    endless = replace(p, rule=replace(PLAIN, shard=0))
    parts = [
        torch.autograd.grad(endless.run("chunked", t, t + SHARD)[0].sum(), p.weights)
        for t in range(0, 3 * SHARD, SHARD)
    ]
    for i, grad in enumerate(whole):
        assert relative_rms(grad, sum(part[i] for part in parts)) < TOLERANCE[torch.float64]


def test_gates_of_exactly_zero():
    p = problem(replace(PLAIN, window=3), 2 * SHARD + 1, heads=2)
    with torch.no_grad():
        p.gates.alpha[:, 3::5] = 0.0
        p.gates.theta[:, 2::4] = 0.0
        p.gates.gamma[:, 7] = 0.0
    compare(p)


def test_bad_shards_are_named():
    with pytest.raises(ValueError, match=r"shard=6 must be 0 .* or a multiple of chunk=4; nearest: 8"):
        replace(PLAIN, shard=6)
    with pytest.raises(ValueError, match=r"every token would read the start weights.* take shard=16 or more"):
        MemoryRule(chunk=8, shard=8, read="chunk")
    with pytest.raises(ValueError, match=r"shard=-8 must be 0"):
        replace(PLAIN, shard=-8)
    with pytest.raises(ValueError, match="read='late' is unknown; choose one of token, chunk"):
        replace(PLAIN, read="late")
    dual = MemoryRule(window=3, chunk=CHUNK, momentum=False, ns_steps=0, kernel="exponential")
    for change in ({"shard": SHARD}, {"read": "chunk"}):
        with pytest.raises(ValueError, match="dual form keeps all sources .* take shard=0 and read='token'"):
            replace(dual, **change)


def test_one_call_scans_all_whole_shards(monkeypatch):
    """They lie side by side in its batch, for none waits for another."""
    calls, scan = [], op.omega_memory_chunked

    def counted(rule, state, own, kernels):
        calls.append(tuple(own.q.shape[:2]))
        return scan(rule, state, own, kernels)

    monkeypatch.setattr(op, "omega_memory_chunked", counted)
    p = problem(PLAIN, 4 * SHARD + 3, heads=2)
    omega_memory(p.q, p.k, p.v, p.gates, p.weights, PLAIN, impl="chunked")
    assert calls == [(2 * 4, SHARD), (2, 3)]
