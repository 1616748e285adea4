"""The sources of every chunk, put there and folded back in kernels, against the torch code."""

from __future__ import annotations

import pytest
import torch

from atlas_kernels import chunked
from atlas_kernels.gpu.windows import windows
from tests.support.device_problems import DEVICE
from tests.support.problems import gradients

BATCH, HEADS = 2, 3


def both_ways(of, halo: torch.Tensor, tokens: torch.Tensor, chunks: int, ask) -> dict[str, torch.Tensor]:
    leaves = {"halo": halo.clone().requires_grad_(), "tokens": tokens.detach().requires_grad_()}
    outputs = dict(zip(("windows", "following"), of(*leaves.values(), chunks), strict=True))
    return outputs | gradients([outputs[name] for name in ask], leaves)


@pytest.mark.parametrize("ask", [("windows", "following"), ("windows",), ("following",)], ids="+".join)
@pytest.mark.parametrize("width", [(), (5,), (16,)])
@pytest.mark.parametrize("chunks,length,before", [(3, 4, 3), (2, 3, 7), (1, 1, 4), (2, 37, 0), (3, 16, 16)])
def test_as_in_torch(chunks, length, before, width, ask):
    """Halos shorter than a chunk, longer, and none; a halo that follows tokens that are fewer."""
    generator = torch.Generator().manual_seed(before)
    random = lambda tokens: torch.randn(BATCH, tokens, HEADS, *width, generator=generator).to(DEVICE)  # noqa: E731
    halo, tokens = random(before), random(chunks * length)
    found = both_ways(windows, halo, tokens, chunks, ask)
    expected = both_ways(chunked.windows, halo, tokens, chunks, ask)
    for name, true in expected.items():
        if name in ("windows", "following"):
            assert torch.equal(found[name], true), name
        else:
            torch.testing.assert_close(found[name], true, rtol=1e-6, atol=1e-6, msg=name)


def test_a_slice_of_the_tokens_in_any_layout():
    t = torch.randn(HEADS, BATCH, 12, 5, device=DEVICE).permute(1, 2, 0, 3)
    halo = torch.randn(BATCH, 2, HEADS, 5, device=DEVICE)
    for tokens in (t[:, 4:], t.mT.contiguous().mT[:, 4:]):
        assert not tokens.is_contiguous()
        found, expected = (both_ways(of, halo, tokens, 2, ("windows",)) for of in (windows, chunked.windows))
        for name, true in expected.items():
            torch.testing.assert_close(found[name], true, rtol=1e-6, atol=1e-6, msg=name)


def test_the_halo_that_follows_keeps_nothing_else_alive():
    tokens = torch.randn(BATCH, 12, HEADS, 5, device=DEVICE)
    _, following = windows(tokens[:, :2], tokens, 3)
    assert following.untyped_storage().nbytes() == following.nbytes
