"""Documents packed into one sequence are the documents on their own."""

import gc
import weakref
from dataclasses import fields

import pytest
import torch

from atlas_kernels import MemoryRule, MemoryState, chunked, delta_rule, omega_memory, packing
from tests.support.problems import Problem, assert_close, gradients, problem, state_tensors

CHUNK = 8
RULES = {
    "sum": MemoryRule("mlp", window=5, chunk=CHUNK, momentum=False, ns_steps=0, norm="layer"),
    "momentum": MemoryRule("gated_mlp", window=5, chunk=CHUNK, ns_steps=0, norm="layer"),
    "orthogonal": MemoryRule("mlp", window=5, chunk=CHUNK, ns_period=4, norm="layer"),
    "summed steps": MemoryRule("mlp", window=5, chunk=CHUNK, ns_steps=3, ns_period=4, ns_step="sum"),
    "wide window": MemoryRule("linear", "dot", window=CHUNK + 5, chunk=CHUNK, ns_steps=0),
    "online": MemoryRule("mlp", window=1, chunk=CHUNK, ns_steps=0, norm="layer"),
    "delta": MemoryRule("linear", window=1, chunk=1, momentum=False, ns_steps=0),
}
LENGTHS = [[3, 1, 9, 8, 14], [20, 15]]


def positions_of(lengths: list[list[int]]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


def run(p: Problem, impl: str, positions, state=None, tokens=slice(None)):
    gates = type(p.gates)(*(g[:, tokens] for g in vars(p.gates).values()))
    residual = None if p.residual is None else tuple(r[:, tokens] for r in p.residual)
    q, k, v = (t[:, tokens] for t in (p.q, p.k, p.v))
    return omega_memory(q, k, v, gates, p.weights, p.rule, state, residual, impl, positions[:, tokens])


@pytest.fixture(params=["held", "recomputed"], autouse=True)
def backward(request, monkeypatch):
    monkeypatch.setattr(delta_rule, "BLOCK", 8)
    if request.param == "recomputed":
        monkeypatch.setattr(chunked, "HELD_BYTES", 0)
        monkeypatch.setattr(delta_rule, "HELD_EVERY", 2)


@pytest.mark.parametrize("pair,residual", [(True, False), (False, True)])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_packed_is_each_on_its_own(rule, pair, residual):
    p = problem(rule, 35, pair=pair, residual=residual and rule.memory != "linear")
    positions = positions_of(LENGTHS)
    results = {}
    for impl in ("reference", "chunked"):
        y, state = run(p, impl, positions)
        assert state.position.tolist() == [14, 15]
        outputs = {"y": y, **state_tensors(state)}
        results[impl] = outputs | gradients(list(outputs.values()), p.leaves())
    assert_close(results["chunked"], results["reference"])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_reference_itself_is_each_on_its_own(rule):
    p = problem(rule, 35)
    y, _ = run(p, "reference", positions_of(LENGTHS))
    for row, lengths in enumerate(LENGTHS):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        alone = [p.run("reference", end - n, end)[0][row] for n, end in zip(lengths, ends, strict=True)]
        assert torch.equal(y[row], torch.cat(alone))


@pytest.mark.parametrize("pair", [True, False])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_any_cut_gives_the_whole(rule, pair):
    p = problem(rule, 35, pair=pair)
    positions = positions_of(LENGTHS)
    y, state = run(p, "chunked", positions)
    whole = {"y": y, **state_tensors(state)}
    whole |= gradients(list(whole.values()), p.leaves())
    for at in (1, 3, 4, 13, 20, 22, 34):
        first, middle = run(p, "chunked", positions, None, slice(0, at))
        second, state = run(p, "chunked", positions, middle, slice(at, None))
        parts = {"y": torch.cat([first, second], 1), **state_tensors(state)}
        assert_close(parts | gradients(list(parts.values()), p.leaves()), whole)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_packed_state_goes_on_without_positions(rule):
    p = problem(rule, 35)
    positions = positions_of(LENGTHS)
    y, _ = run(p, "chunked", positions)
    _, middle = run(p, "chunked", positions, None, slice(0, 23))
    rest, _ = p.run("chunked", 23, None, middle)
    assert_close({"y": rest}, {"y": y[:, 23:]})


def test_a_packed_state_is_a_state_like_any_other():
    """Kept, detached, moved, and taken apart and put together by its fields, as a cache does."""
    p, positions = problem(RULES["summed steps"], 35), positions_of(LENGTHS)
    _, middle = run(p, "chunked", positions, None, slice(0, 23))
    assert isinstance(middle, MemoryState)
    expected, _ = run(p, "chunked", positions, middle, slice(23, None))
    rebuilt = MemoryState(**{field.name: getattr(middle, field.name) for field in fields(middle)})
    for state in (middle.detach(), middle.map(torch.clone), rebuilt, middle.at(middle.position.clone())):
        assert torch.equal(state.position, middle.position) and len(state.tensors()) == len(middle.tensors())
        assert torch.equal(run(p, "chunked", positions, state, slice(23, None))[0], expected)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_call_may_begin_inside_a_document(rule):
    """With no state before it: chunks and writes then lie where the positions say, in every implementation."""
    p = problem(rule, 20)
    positions = torch.stack([torch.arange(20) + 5, torch.cat([torch.arange(6) + 3, torch.arange(14)])])
    found = {}
    for impl in ("reference", "chunked"):
        y, state = run(p, impl, positions)
        found[impl] = {"y": y, **state_tensors(state)}
        assert state.position.tolist() == [25, 14]
    assert_close(found["chunked"], found["reference"])


def test_filling_up_does_not_tip_a_batch_into_recomputation(monkeypatch):
    p = problem(RULES["sum"], 4 * CHUNK)
    _, state = p.run("chunked")
    monkeypatch.setattr(chunked, "HELD_BYTES", chunked.graph_bytes(p.rule, state, 4 * CHUNK))
    recomputed = []
    monkeypatch.setattr(chunked, "checkpoint", lambda scan, *a, **_: recomputed.append(scan) or scan(*a))
    run(p, "chunked", positions_of([[12, 20]] * 2))  # five chunks
    assert not recomputed
    run(p, "chunked", positions_of([[1] * 4 * CHUNK] * 2))  # a chunk each
    assert recomputed


def test_bad_positions_are_named():
    p = problem(RULES["sum"], 6)
    with pytest.raises(ValueError, match=r"positions has shape \(2, 4\)"):
        run(p, "chunked", torch.zeros(2, 6, dtype=torch.int64)[:, :4])
    with pytest.raises(ValueError, match="keeps its sources over document borders"):
        dual = problem(MemoryRule(window=5, chunk=CHUNK, momentum=False, ns_steps=0, kernel="exponential"), 6)
        run(dual, "chunked", torch.zeros(2, 6, dtype=torch.int64))


def test_the_host_reads_the_positions_once_a_batch(monkeypatch):
    """Every layer asks for the same positions, or the same part of them; a GPU would wait for each read."""
    read = []
    monkeypatch.setattr(packing, "_pack", lambda *given, make=packing._pack: read.append(1) or make(*given))
    p, positions = problem(RULES["sum"], 35), positions_of(LENGTHS)
    first, second = (run(p, "chunked", positions)[0] for _ in range(2))
    assert len(read) == 1 and torch.equal(first, second)
    packing.pack(positions, CHUNK), packing.pack(positions, 2 * CHUNK), packing.pack(positions[:, :20], CHUNK)
    assert len(read) == 3
    positions[1, 20:] += 1
    assert torch.equal(packing.pack(positions, CHUNK).positions, positions) and len(read) == 4
    with torch.inference_mode():
        packing.pack(positions.clone(), CHUNK)
    assert len(read) == 5


def test_what_was_packed_goes_with_its_positions():
    positions = positions_of(LENGTHS)
    gone, made = weakref.ref(positions), weakref.ref(packing.pack(positions, CHUNK))
    del positions
    gc.collect()
    assert gone() is None and made() is None


ONE_TOKEN = RULES | {
    "a chunk of one period": MemoryRule("mlp", window=3, chunk=2, ns_steps=3, ns_period=2),
    "periods of two": MemoryRule("mlp", window=3, chunk=6, ns_steps=3, ns_period=2, ns_step="sum"),
    "a chunk a token": MemoryRule("gated_mlp", window=3, chunk=1, ns_steps=0, norm="layer"),
    "shards": MemoryRule("mlp", window=3, chunk=4, shard=8, ns_steps=3, ns_period=2),
    "read at the chunk's start": MemoryRule("mlp", window=3, chunk=4, shard=8, ns_steps=0, norm="layer", read="chunk"),
}


@pytest.mark.parametrize("pair,residual", [(True, False), (False, True)])
@pytest.mark.parametrize("rule", ONE_TOKEN.values(), ids=ONE_TOKEN)
def test_token_by_token_is_the_whole(rule, pair, residual):
    """Every row at a position of its own, over the borders of chunks, periods and documents; gradients too."""
    p = problem(rule, 19, pair=pair, residual=residual and rule.memory != "linear")
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(14)]), torch.arange(19) + 3])
    expected, after = run(p, "reference", positions)
    outputs = {"y": expected, **state_tensors(after)}
    whole = outputs | gradients(list(outputs.values()), p.leaves())
    pieces, state = [], None
    for place in range(19):
        y, state = run(p, "chunked", positions, state, slice(place, place + 1))
        pieces.append(y)
        assert state.position.tolist() == (positions[:, place] + 1).tolist()
    outputs = {"y": torch.cat(pieces, 1), **state_tensors(state)}
    assert_close(outputs | gradients(list(outputs.values()), p.leaves()), whole)


def test_one_token_a_row_takes_no_whole_chunk(monkeypatch):
    """Rows at several positions are not filled up to a chunk each."""
    rule = MemoryRule("mlp", window=5, chunk=64, momentum=False, ns_steps=0, norm="layer")
    p, positions = problem(rule, 9), torch.stack([torch.arange(9) + 7, torch.arange(9) + 60])
    _, state = run(p, "chunked", positions, None, slice(0, 5))
    monkeypatch.setattr(packing, "_pack", None)
    run(p, "chunked", positions, state, slice(5, 6))
