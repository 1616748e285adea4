"""Tokens that read the weights of their chunk's start (`read="chunk"`; TNT, arXiv 2511.07343 Eqs 5, 7), and what such
chunks leave (leaving.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atlas_kernels import Gates, MemoryRule, omega_memory
from atlas_kernels.decays import decay_matrix, pair_band, source_band
from atlas_kernels.leaving import by_source, discounted
from atlas_kernels.reference import inner_loss, memory
from tests.kernels.test_packing import positions_of, run
from tests.support.problems import TOLERANCE, assert_close, compare, gradients, problem, relative_rms, state_tensors

CHUNK = 8
STALE = MemoryRule("mlp", window=3, chunk=CHUNK, read="chunk", ns_steps=0, norm="layer")
RULES = {
    "titans": STALE,
    "omeganet": replace(STALE, momentum=False),
    "gated, dot, wide window": replace(STALE, memory="gated_mlp", loss="dot", window=CHUNK + 3, norm="none"),
    "linear": replace(STALE, memory="linear", norm="none"),
    "online": MemoryRule("linear", window=1, chunk=1, read="chunk", momentum=False, ns_steps=0),
    "atlas": replace(STALE, ns_steps=3, norm="none"),
    "atlas, once a chunk": replace(STALE, ns_steps=3, ns_period=CHUNK, norm="none", momentum=False),
    "summed steps": replace(STALE, memory="gated_mlp", ns_steps=3, ns_period=4, ns_step="sum", norm="none"),
    "first order": replace(STALE, anchor_gradient=0.0),
}


@pytest.mark.parametrize("pair", [True, False], ids=["pair", "source"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_chunked_is_the_reference(rule, pair):
    for tokens in (1, CHUNK - 1, CHUNK, 2 * CHUNK + 3):
        compare(problem(rule, tokens, pair=pair, batch=1, heads=2, seed=tokens))


@pytest.mark.parametrize("ns_steps", [0, 3])
@pytest.mark.usefixtures("backward")
def test_every_way_of_the_backward_and_a_residual_of_its_own(ns_steps):
    rule = replace(STALE, ns_steps=ns_steps)
    compare(problem(rule, 2 * CHUNK + 3, pair=False, residual=True, key=5, value=3, hidden=7, heads=1))


def test_the_reference_itself_is_the_global_memory():
    """Eq 5 and the first part of Eq 7, with autograd: V' = V - sum of a chunk's eta grad L(V); a token reads V."""
    rule = replace(STALE, window=1, momentum=False, norm="none")
    p = problem(rule, 2 * CHUNK + 3, batch=1, heads=1)
    ones = torch.ones_like(p.gates.alpha)
    gates = Gates(ones, p.gates.eta, torch.zeros_like(ones), ones)
    y, state = omega_memory(p.q, p.k, p.v, gates, p.weights, rule, impl="reference")
    V, read = tuple(w.detach()[None].requires_grad_() for w in p.weights), []
    for first in range(0, 2 * CHUNK + 3, CHUNK):
        own = slice(first, first + CHUNK)
        read.append(memory(rule, V, p.q[:, own], p.q[:, own]))
        loss = (p.gates.eta[:, own] * inner_loss(rule, V, p.k[:, own], p.v[:, own], p.k[:, own])).sum()
        V = tuple((w - g).detach().requires_grad_() for w, g in zip(V, torch.autograd.grad(loss, V), strict=True))
    expected = {"y": torch.cat(read, 1)} | {f"weights[{i}]": w for i, w in enumerate(V)}
    assert_close({"y": y} | {f"weights[{i}]": w for i, w in enumerate(state.weights)}, expected)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_what_it_leaves_is_what_any_read_leaves(rule):
    p = problem(rule, CHUNK + 3, batch=1, heads=2)
    _, stale = p.run("chunked")
    _, fresh = replace(p, rule=replace(rule, read="token")).run("reference")
    assert_close(state_tensors(stale), state_tensors(fresh))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_any_cut_gives_the_whole(rule, impl):
    p = problem(rule, CHUNK + 5, pair=impl == "reference", batch=1, heads=1)
    y, state = p.run(impl)
    whole = {"y": y, **state_tensors(state)}
    whole |= gradients(list(whole.values()), p.leaves())
    for at in (1, CHUNK - 1, CHUNK, CHUNK + 2):
        first, middle = p.run(impl, 0, at)
        second, state = p.run(impl, at, None, middle)
        parts = {"y": torch.cat([first, second], 1), **state_tensors(state)}
        assert_close(parts | gradients(list(parts.values()), p.leaves()), whole)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_packed_documents(rule):
    p, positions = problem(rule, 21, pair=False, heads=1), positions_of([[3, 1, 9, 8], [13, 8]])
    found = {}
    for impl in ("reference", "chunked"):
        y, state = run(p, impl, positions)
        found[impl] = {"y": y, **state_tensors(state)}
        found[impl] |= gradients(list(found[impl].values()), p.leaves())
    assert_close(found["chunked"], found["reference"])
    first, middle = run(p, "chunked", positions, None, slice(0, 15))
    second, state = run(p, "chunked", positions, middle, slice(15, None))
    parts = {"y": torch.cat([first, second], 1), **state_tensors(state)}
    assert_close(parts, {name: found["chunked"][name] for name in parts})


def test_gates_of_exactly_zero():
    for ns_steps in (0, 3):
        p = problem(replace(STALE, ns_steps=ns_steps), 2 * CHUNK + 1, batch=1, heads=2)
        with torch.no_grad():
            p.gates.alpha[:, 3::5] = 0.0
            p.gates.theta[:, 2::4] = 0.0
            p.gates.gamma[:, 7] = 0.0
        compare(p)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 9, 16, 23])
def test_steps_are_discounted_as_by_the_whole_matrix(tokens, zeros):
    generator = torch.Generator().manual_seed(tokens)
    steps = torch.randn(2, 3, 5, tokens, generator=generator, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(2, 3, 1, tokens, generator=generator, dtype=torch.float64)
    if zeros:
        gate[..., ::3] = 0.0
        gate[0, 0] = 0.0
    gate.requires_grad_()
    leaves = {"steps": steps, "gate": gate}
    ours, whole = discounted(steps, gate), steps @ decay_matrix(gate.squeeze(-2))
    assert_close({"u": ours} | gradients([ours], leaves), {"u": whole} | gradients([whole], leaves))


@pytest.mark.parametrize("window", [1, 3, 11])
def test_sums_by_source_are_products_with_the_band(window):
    generator = torch.Generator().manual_seed(window)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)  # noqa: E731
    rows, pair, sources = draw(2, 3, 4, 7), draw(2, 3, 7, window), draw(2, 3, 7 + window - 1)
    found, expected = {}, {}
    for name, gates, own, band in (
        ("pair", (pair, None), pair, pair_band(pair)),
        ("source", (None, sources), sources, source_band(sources, 7)),
    ):
        ours, whole = by_source(rows, *gates, window), rows @ band
        leaves = {f"rows of {name}": rows, name: own}
        found |= {f"out of {name}": ours} | gradients([ours], leaves)
        expected |= {f"out of {name}": whole} | gradients([whole], leaves)
    assert_close(found, expected)


@pytest.mark.parametrize("ns_steps", [0, 3])
def test_nothing_as_large_as_a_chunks_square_is_made(ns_steps):
    """No tensor that the backward holds of a chunk of 2,048 tokens has more than C sqrt(C) numbers, or C F."""
    chunk = 2048
    rule = replace(STALE, chunk=chunk, ns_steps=ns_steps, ns_period=chunk if ns_steps else 1)
    p, sizes = problem(rule, chunk, batch=1, heads=1, dtype=torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        p.run("chunked")
    assert max(sizes) < 1.1 * chunk**1.5


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_what_nobody_reads_has_a_gradient_of_zero(impl):
    """One chunk is written and never read: data parallelism waits for a gradient of every parameter."""
    p = problem(STALE, CHUNK, batch=1, heads=1)
    y, _ = p.run(impl)
    given = {name: leaf for name, leaf in p.leaves().items() if name in ("k", "v", *vars(p.gates))}
    grads = torch.autograd.grad(y.sum(), list(given.values()))
    assert len(grads) == 6 and not any(grad.any() for grad in grads)
    with torch.no_grad():
        assert torch.equal(p.run(impl)[0], y)


def test_the_gpus_kernels_refuse_it_by_name():
    p = problem(replace(STALE, chunk=16), 16, key=16, value=16, hidden=16, dtype=torch.float32)
    with pytest.raises(ValueError, match="read='chunk'.*take impl='chunked'"):
        p.run("triton")
    assert relative_rms(p.run("auto")[0], p.run("reference")[0]) < TOLERANCE[torch.float32]
