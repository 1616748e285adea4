"""The short causal convolution between a projection and a memory: depthwise, SiLU, carried over cuts by its tail.

Dims: B batch, T tokens, H heads, K head size, L taps.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .kernels_atlas import copying, initial_taps, late_keys, open_gate, short_convolution


class ShortConvolution(nn.Module):
    """Filters of the q, k and v channels of each head: weight [H, 3K, L], the newest token's tap last."""

    def __init__(self, heads: int, head_dim: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, 3 * head_dim, taps))

    def start(self) -> dict[str, Tensor]:
        heads, channels, taps = self.weight.shape
        return {"weight": initial_taps(heads, channels // 3, taps)}

    def forward(self, qkv: Tensor, tail: Tensor | None, documents: Tensor | None) -> tuple[Tensor, ...]:
        """[B, T, H, 3, K] -> q and k of length 1, v, [B, T, H, K] each, at least float32; the tail for what follows.

        tail [B, 3HK, L-1]: the inputs before the first token; None: there are none. documents: see `TokenPositions`.
        """
        return short_convolution(qkv, self.weight, tail, documents)


def edge_starts(section: SimpleNamespace, projection: nn.Linear, convolution: ShortConvolution) -> dict[str, Tensor]:
    """What `late_keys`, `copying` and an open gate make of a layer's parameters as they were drawn, where its section
    asks for them; by their names in it."""
    taps = convolution.weight.detach()
    rows, own = projection.weight.detach().unflatten(0, (len(taps), 4, -1)), {}
    if section.late_keys:
        rows, taps = late_keys(rows, taps)
    if section.copy_start:
        taps, own["linear_out.weight"] = copying(rows, taps)
    if section.open_gate:
        own["branch_bias"] = open_gate(section.heads, section.head_dim)
    return {"linear_qkvg.weight": rows.flatten(0, 2), "convolution.weight": taps, **own}
