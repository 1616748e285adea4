"""Periodic writes as one chain in Triton against the chunk form in torch: forward, state, every gradient (interpreted
without a GPU); and that its launches do not grow with the sequence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atlas_kernels import MemoryRule, chunked, omega_memory
from atlas_kernels.gpu import chain, orthogonal_writes
from atlas_megatron.config import MemoryConfig
from atlas_megatron.config.presets import PRESETS
from benchmarks.fake_gpu import Counts, fake_gpu
from benchmarks.presets import contender
from tests.support.device_problems import CHUNK, DEVICE, compare, compare_rounded, small
from tests.support.problems import assert_close, gradients, state_tensors

BASE = MemoryRule(window=4, chunk=CHUNK, ns_steps=2, ns_period=8)

# The interpreter's sigmoid of a very negative number: 1 / (1 + inf), which is right.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.fixture(autouse=True)
def _no_chunk_by_chunk(monkeypatch):
    """The other way with Newton-Schulz would give the same numbers."""
    monkeypatch.delattr(orthogonal_writes, "OrthogonalSteps")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory": "gated_mlp", "ns_step": "sum"},
        {"norm": "layer", "loss": "dot", "ns_period": CHUNK, "ns_steps": 3},
        {"memory": "gated_mlp", "norm": "layer", "momentum": False, "ns_coefficients": "polar_express"},
        {"momentum": False, "loss": "dot"},
        {"window": 1},
        {"residual": False},
        {"memory": "gated_mlp", "residual": False, "norm": "layer"},
        {"ns_period": 2, "window": CHUNK + 3},
        {"anchor_gradient": 0},
        {"anchor_gradient": 0.3, "norm": "layer"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())) or "base",
)
def test_every_rule(changes):
    compare(small(replace(BASE, **changes), CHUNK + 9, pair=changes.get("window") != 1))


@pytest.mark.parametrize("tokens", [1, 7, 8, CHUNK, CHUNK + 1, 2 * CHUNK + 9])
def test_lengths(tokens):
    """Whose last chunk has no write, or ends between two, and whose momentum leaves all the same."""
    compare(small(BASE, tokens, pair=tokens != CHUNK, seed=tokens))


@pytest.mark.parametrize("memory", ["mlp", "gated_mlp"])
def test_several_heads_residual_and_widths_between_powers_of_two(memory):
    rule = replace(BASE, memory=memory)
    compare(small(rule, CHUNK + 3, batch=2, heads=2, residual=True, key=48, value=48, hidden=48))


def test_columns_and_sources_in_several_blocks(monkeypatch):
    monkeypatch.setattr(chain, "SOURCES", 16)
    for memory in ("mlp", "gated_mlp"):
        compare(small(replace(BASE, memory=memory, window=6, norm="layer"), CHUNK + 8, hidden=80))


def test_segments_that_are_recomputed(monkeypatch):
    monkeypatch.setattr(chunked, "HELD_BYTES", 0)
    monkeypatch.setattr(chunked, "SEGMENT_BYTES", 0)
    compare(small(BASE, 3 * CHUNK + 2))


def test_gates_of_exactly_zero():
    p = small(BASE, CHUNK + 9)
    with torch.no_grad():
        p.gates.alpha[:, 3::5] = 0.0
        p.gates.theta[:, 2::4] = 0.0
        p.gates.eta[:, 7] = 0.0
        p.gates.gamma[:, 5] = 0.0
    compare(p)


def test_a_momentum_of_zero():
    """A write of nothing: Newton-Schulz gives 0, and no NaN comes back from it."""
    p = small(BASE, CHUNK + 9)
    with torch.no_grad():
        p.gates.gamma.zero_()
    compare(p)


@pytest.mark.parametrize("memory,pair,residual", [("mlp", False, False), ("gated_mlp", True, True)])
def test_any_cut_gives_the_whole(memory, pair, residual):
    p = small(replace(BASE, memory=memory), 2 * CHUNK + 5, pair=pair, residual=residual)
    y, state = p.run("chunked")
    whole = {"y": y, **state_tensors(state)}
    whole |= gradients(list(whole.values()), p.leaves())
    for at in (1, 7, 8, CHUNK, CHUNK + 11) if memory == "mlp" else (7, CHUNK + 11):
        first, middle = p.run("triton", 0, at)
        second, state = p.run("triton", at, None, middle)
        parts = {"y": torch.cat([first, second], 1), **state_tensors(state)}
        assert_close(parts | gradients(list(parts.values()), p.leaves()), whole)


def test_the_states_own_gradients():
    """With respect to an incoming state, cut inside a chunk, whose anchor is not its weights."""
    p = small(BASE, 2 * CHUNK + 9, pair=False)
    _, start = p.run("chunked", 0, 11)
    start = start.map(lambda t: t.detach().clone().requires_grad_())
    results = {}
    for impl in ("chunked", "triton"):
        y, state = p.run(impl, 11, None, start)
        results[impl] = gradients([y, *state.tensors()], state_tensors(start))
    assert_close(results["triton"], results["chunked"])
    assert all(g.abs().max() > 0 for g in results["triton"].values())


def test_packed_documents():
    """Borders in one row and in all, at a chunk's border and in it, in the call's first chunk and at its end."""
    p = small(BASE, 2 * CHUNK + 3, batch=2)
    lengths = [[3, 9, CHUNK, 7], [CHUNK, CHUNK + 3]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).to(DEVICE)
    results = []
    for impl in ("triton", "chunked"):
        y, state = omega_memory(p.q, p.k, p.v, p.gates, p.weights, p.rule, impl=impl, positions=positions)
        outputs = {"y": y, **state_tensors(state)}
        results.append(outputs | gradients(list(outputs.values()), p.leaves()))
    assert_close(*results)


def test_shards():
    """Whole shards lie side by side in the batch, with Newton-Schulz too."""
    compare(small(replace(BASE, shard=CHUNK), 2 * CHUNK + 3, pair=False))


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_without_gradients_the_same_bits(norm):
    p = small(replace(BASE, norm=norm), CHUNK + 9)
    y, state = p.run("triton")
    with torch.no_grad():
        again, after = p.run("triton")
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), after.tensors(), strict=True))


def test_causal_to_the_bit():
    before, _ = small(BASE, 2 * CHUNK).run("triton")
    for t in (0, 7, CHUNK + 3):
        changed = small(BASE, 2 * CHUNK)
        with torch.no_grad():
            for leaf in (changed.q, changed.k, changed.v, *vars(changed.gates).values()):
                leaf[:, t] *= 0.5
        after, _ = changed.run("triton")
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("changes", [{}, {"memory": "gated_mlp", "norm": "layer", "momentum": False}])
def test_half_precision_products(changes):
    compare_rounded(small(replace(BASE, **changes), CHUNK + 9), torch.float16)


@pytest.mark.parametrize(
    "rule,widths,products,covered",
    [
        (MemoryRule(ns_period=16), (64, 64, 256), torch.bfloat16, True),
        (MemoryRule("gated_mlp", ns_period=8, norm="layer"), (64, 64, 256), torch.float16, True),
        (MemoryRule(ns_period=4), (64, 64, 256), torch.bfloat16, False),  # K = 16: in parallel
        (MemoryRule(ns_period=16), (64, 64, 512), torch.bfloat16, False),
        (MemoryRule(ns_period=16), (128, 128, 128), torch.bfloat16, False),
        (MemoryRule(ns_period=16), (32, 64, 256), torch.bfloat16, False),
        (MemoryRule(ns_period=16), (64, 64, 32), torch.bfloat16, False),
        (MemoryRule(ns_period=128, chunk=128), (64, 64, 256), torch.bfloat16, False),
        (MemoryRule(ns_period=16), (64, 64, 256), torch.float32, False),
        (MemoryRule("linear", ns_period=16), (64, 64, None), torch.bfloat16, False),
    ],
)
def test_what_the_chain_covers(rule, widths, products, covered):
    D, V, F = widths
    shapes = [(1, V, D)] if F is None else [(1, V, F), (1, F, D)]
    assert chain.covers(rule, tuple(torch.empty(shape, device="meta") for shape in shapes), products) == covered


def _counted(period: int, batch: int, tokens: int) -> Counts:
    memory = replace(MemoryConfig(heads=16, head_dim=64), **(PRESETS["atlas"] | {"ns_period": period}))
    run = contender(memory, batch=batch, tokens=tokens, products=torch.bfloat16, device="meta", impl="triton")
    with fake_gpu() as counts:
        run()
    return counts


@pytest.mark.parametrize("period", [16, 64])
def test_launches_do_not_grow_with_the_sequence(period, monkeypatch):
    """Of the op forward and backward, a whole segment held: four kernels, and torch's operators."""
    monkeypatch.setattr(chunked, "HELD_BYTES", 1 << 50)
    short, long, alone = _counted(period, 8, 1024), _counted(period, 8, 4096), _counted(period, 1, 32768)
    chains = {f"chain_{kernel}": 1 for kernel in chain.KERNELS}
    assert long.kernels == chains | {"windows": 2, "fold": 2}
    assert short.kernels == long.kernels == alone.kernels
    assert short.operators == long.operators
    assert max(c.torch_launches + c.launches for c in (long, alone)) <= 400
