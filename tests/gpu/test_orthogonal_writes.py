"""Orthogonalised writes in Triton against the chunk form in torch: forward, state, every gradient (interpreted without
a GPU)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atlas_kernels import MemoryRule, chunked, omega_memory
from atlas_kernels import newton_schulz as in_torch
from atlas_kernels.gpu import chain, orthogonal_writes
from atlas_kernels.gpu.newton_schulz import Source, coefficient_table, launch_backward, launch_forward
from atlas_kernels.gpu.stack import Stack
from tests.support.device_problems import (
    CHUNK,
    DEVICE,
    NEWTON_SCHULZ_TOLERANCE,
    compare,
    compare_rounded,
    outputs_and_gradients,
    small,
)
from tests.support.problems import assert_close, gradients, relative_rms, state_tensors

BASE = MemoryRule(window=5, chunk=CHUNK, ns_steps=2, ns_period=8, norm="layer")

# The interpreter's sigmoid of a very negative number: 1 / (1 + inf), which is right.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.fixture(autouse=True)
def _chunk_by_chunk(monkeypatch):
    """Few writes a chunk too, which the chain would take."""
    monkeypatch.setattr(chain, "MOST_WRITES", 0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "none", "loss": "dot", "ns_steps": 3},
        {"memory": "gated_mlp", "ns_period": CHUNK},
        {"memory": "linear", "norm": "none", "ns_coefficients": "polar_express"},
        {"momentum": False, "window": 3},
        {"ns_step": "sum"},
        {"residual": False},
        {"anchor_gradient": 0},
        {"anchor_gradient": 0.3},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())) or "base",
)
def test_every_rule(changes):
    compare(small(replace(BASE, **changes), 2 * CHUNK + 5))


@pytest.mark.parametrize("tokens", [1, 5, 6])
def test_a_write_at_every_token(tokens):
    """With a chunk that is not whole, and a window beyond the chunk."""
    compare(small(replace(BASE, chunk=5, window=7, ns_period=1), tokens, pair=tokens == 6, seed=tokens))


@pytest.mark.parametrize(
    "sizes",
    [
        {"key": 48, "value": 24, "hidden": 40, "residual": True, "batch": 2, "heads": 2},
        {"key": 32, "value": 32, "hidden": 17},  # wider than tall
        {"hidden": 300},  # Newton-Schulz by blocks of columns
    ],
    ids=["several heads", "wider than tall", "by blocks"],
)
def test_widths(sizes):
    compare(small(replace(BASE, ns_period=4, chunk=4), 4, **sizes))


def test_more_tokens_than_a_program_takes():
    compare(small(replace(BASE, chunk=80, ns_period=40, window=20), 81))


def test_segments_that_are_recomputed(monkeypatch):
    monkeypatch.setattr(chunked, "HELD_BYTES", 0)
    monkeypatch.setattr(chunked, "SEGMENT_BYTES", 0)
    compare(small(BASE, CHUNK + 2))


def test_gates_of_exactly_zero():
    p = small(replace(BASE, window=3), CHUNK + 9)
    with torch.no_grad():
        p.gates.alpha[:, 3::5] = 0.0
        p.gates.theta[:, 2::4] = 0.0
        p.gates.gamma[:, 7] = 0.0
        p.gates.eta[:, 7] = 0.0
    compare(p)


def test_any_cut_gives_the_whole():
    p = small(BASE, CHUNK + 9, pair=False, residual=True)
    whole = outputs_and_gradients(p, "chunked")
    for at in (3, CHUNK + 2):
        first, middle = p.run("triton", 0, at)
        second, state = p.run("triton", at, None, middle)
        parts = {"y": torch.cat([first, second], 1), **state_tensors(state)}
        assert_close(parts | gradients(list(parts.values()), p.leaves()), whole)


def test_packed_documents():
    p = small(BASE, CHUNK + 9, batch=2)
    lengths = [[3, 9, 13], [20, 5]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).to(DEVICE)
    results = []
    for impl in ("triton", "chunked"):
        y, state = omega_memory(p.q, p.k, p.v, p.gates, p.weights, p.rule, impl=impl, positions=positions)
        outputs = {"y": y, **state_tensors(state)}
        results.append(outputs | gradients(list(outputs.values()), p.leaves()))
    assert_close(*results)


@pytest.mark.parametrize("memory", ["mlp", "gated_mlp"])
def test_half_precision_products(memory):
    compare_rounded(small(replace(BASE, memory=memory), CHUNK + 9), torch.float16)


def test_equal_reruns_and_nothing_read_before_it_is_written():
    """torch.empty gives NaN in the second run. Both are deterministic: `running_sum` adds in another order there."""
    p = small(BASE, CHUNK + 3)
    torch.use_deterministic_algorithms(True)
    try:
        torch.utils.deterministic.fill_uninitialized_memory = False
        first = outputs_and_gradients(p, "triton")
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert torch.empty(3).isnan().all()
        second = outputs_and_gradients(p, "triton")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nan_is_not_left_out():
    """A read leaves out the matrices whose weights are zero; a gate that is NaN must come through."""
    p = small(BASE, CHUNK)
    with torch.no_grad():
        p.gates.eta[:, 7] = torch.nan
        y, _ = p.run("triton")
    assert y[:, 7:].isnan().all()


@pytest.mark.parametrize("widens", [True, False])
def test_what_a_token_does_not_see_leaves_no_nan(widens):
    """A matrix that is NaN, of three, which the first tokens see with a weight of zero."""
    F, D, T = 20, 12, 5
    stack, base = torch.randn(2, 3, F, D, device=DEVICE), torch.randn(2, F, D, device=DEVICE)
    weights, alphas = torch.randn(2, 3, T, device=DEVICE), torch.randn(2, T, device=DEVICE)
    stack[:, 1], weights[:, 1, :3] = torch.nan, 0.0
    x = torch.randn(2, T, D if widens else F, device=DEVICE)
    found = orthogonal_writes._through(x, Stack(base, alphas, stack, weights), torch.float32, widens).out_pointer
    assert found[:, 3:].isnan().all()
    seen = torch.einsum("gkt,gkfd->gtfd", weights, stack.nan_to_num()) + alphas[..., None, None] * base[:, None]
    expected = torch.einsum("gtfd,gtd->gtf" if widens else "gtfd,gtf->gtd", seen, x)
    torch.testing.assert_close(found[:, :3], expected[:, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "sides,products",
    [((24, 40), torch.float32), ((24, 40), torch.float16), ((40, 200), torch.float32), ((70, 90), torch.float16)],
    ids=["whole", "whole, half", "backward by blocks", "by blocks, half"],
)
def test_a_matrix_and_its_gradient_formed_on_chip(sides, products):
    """Beside torch's Newton-Schulz of the same sums; two matrices an owner, two owners."""
    m, n = sides
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(DEVICE)  # noqa: E731

    def formed(rank: int) -> Source:
        short, long = normal(2, rank, m), normal(2, rank, n)
        return Source(normal(2, m, n), normal(2, 2), normal(2, 2, rank), short, long, share=2)

    def in_memory(s: Source) -> torch.Tensor:
        sums = torch.einsum("gkr,grm,grn->gkmn", s.coefficients, s.short, s.long)
        return (sums + s.scales[..., None, None] * s.base[:, None]).flatten(0, 1).double()

    source, gradient = formed(37), formed(5)
    table = coefficient_table(2, "jordan", torch.device(DEVICE))
    found, found_gradient = (torch.full((4, m, n), torch.nan, device=DEVICE) for _ in range(2))
    norms = launch_forward(source, table, products, found)
    launch_backward(source, gradient, norms, table, products, found_gradient)
    S = in_memory(source).requires_grad_()
    true = in_torch(S, 2)
    (true_gradient,) = torch.autograd.grad(true, S, in_memory(gradient))
    # The sums' own operands are rounded too.
    forward, backward = (1.5 * bound for bound in NEWTON_SCHULZ_TOLERANCE[products])
    assert relative_rms(found.double(), true) < forward
    assert relative_rms(found_gradient.double(), true_gradient) < backward


@pytest.mark.parametrize(
    "sizes,message",
    [
        ({"key": 80, "value": 80}, "up to 64. and F up to 512, not D=80, V=80, F=32 with float32 products"),
        ({"hidden": 520}, "F up to 512, not D=16, V=16, F=520"),
    ],
)
def test_what_no_kernel_covers(sizes, message):
    with pytest.raises(ValueError, match=f"^impl='triton' with ns_steps > 0 covers .*{message}"):
        small(BASE, 3, **sizes).run("triton")
