"""The backward passes written by hand, against finite differences in float64."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from atlas_kernels import reads
from atlas_kernels.layer_norm import layer_norm, pull_through_layer_norm
from atlas_kernels.layout import Layout
from atlas_kernels.products import step_pair, times_transpose

G, C, SOURCES, WIDE, NARROW = 2, 3, 4, 5, 3


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("terms", [1, 2])
def test_reads(terms):
    """Values against matrices formed for every token, and every gradient."""
    sources, wide, narrow = leaf(G, C, SOURCES), leaf(G, SOURCES, WIDE), leaf(G, SOURCES, NARROW)
    held = [t for _ in range(terms) for t in (leaf(G, C, 1), leaf(G, WIDE, NARROW))]
    x, h = leaf(G, C, NARROW), leaf(G, C, WIDE)
    formed = torch.einsum("gci,giw,gin->gcwn", sources, wide, narrow)
    formed = formed + sum(c[..., None] * M[:, None] for c, M in zip(held[::2], held[1::2], strict=True))
    expected = torch.einsum("gcwn,gcn->gcw", formed, x), torch.einsum("gcwn,gcw->gcn", formed, h)
    for read, token, out in ((reads.widen, x, expected[0]), (reads.narrow, h, expected[1])):
        arguments = (token, sources, wide, narrow, *held)
        torch.testing.assert_close(read(*arguments), out, rtol=1e-12, atol=1e-12)
        assert gradcheck(read, arguments)


def test_products():
    W, S, last = leaf(G, WIDE, NARROW), leaf(G, WIDE, NARROW), leaf(G, 3, 1)
    of_sources = [leaf(G, SOURCES, width) for width in (1, 1, WIDE, NARROW)]
    assert gradcheck(step_pair, (W, S, last, *of_sources))
    assert gradcheck(times_transpose, (leaf(G, C, NARROW), leaf(G, SOURCES, NARROW)))


def test_layer_norm_pull():
    o, e = leaf(G, C, 6), leaf(G, C, 6)
    (pulled,) = torch.autograd.grad(layer_norm(o), o, e.detach())
    torch.testing.assert_close(pull_through_layer_norm(o, e), pulled, rtol=1e-12, atol=1e-12)
    plus = pull_through_layer_norm(o, e + layer_norm(o))
    torch.testing.assert_close(pull_through_layer_norm(o, e, True), plus, rtol=1e-12, atol=1e-12)
    for plus_output in (False, True):
        assert gradcheck(pull_through_layer_norm, (o, e, plus_output))


@pytest.mark.parametrize("window", [1, 3, 7])
def test_sources_of_chunks(window):
    """Windows that overlap none, one and two chunks back."""
    layout = Layout(chunks=3, tokens=3)
    assert gradcheck(layout.with_halo, (leaf(2, window - 1, 2, 2), leaf(2, 9, 2, 2)))
