"""The short causal convolution between a projection and a memory: depthwise, SiLU, carried over cuts by its tail.

Dims: B batch, T tokens, H heads, K head size, L taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortConvolution(nn.Module):
    """Filters of the q, k and v channels of each head: weight [H, 3K, L], the newest token's tap last."""

    def __init__(self, heads: int, head_dim: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, 3 * head_dim, taps))

    def start(self) -> dict[str, Tensor]:
        bound = self.weight.shape[-1] ** -0.5
        return {"weight": torch.empty(self.weight.shape).uniform_(-bound, bound)}

    def forward(self, qkv: Tensor, tail: Tensor | None, documents: Tensor | None) -> tuple[Tensor, ...]:
        """[B, T, H, 3, K] -> q and k of length 1, v, [B, T, H, K] each, at least float32; the tail for what follows.

        tail [B, 3HK, L-1]: the inputs before the first token; None: there are none. documents: see `Place`.
        """
        filters = self.weight.flatten(0, 1)
        before, channels = filters.shape[-1] - 1, qkv.flatten(2).transpose(1, 2)
        if tail is None:
            tail = channels.new_zeros(*channels.shape[:2], before)
        channels = torch.cat([tail, channels], -1)
        if documents is None:
            mixed = F.conv1d(channels, filters.unsqueeze(1), groups=channels.shape[1])
        else:
            mixed = _within_documents(channels, filters, documents.unsqueeze(1))
        q, k, v = wide(F.silu(mixed).transpose(1, 2)).unflatten(-1, qkv.shape[2:]).unbind(-2)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, channels[..., channels.shape[-1] - before :]


def _within_documents(channels: Tensor, filters: Tensor, documents: Tensor) -> Tensor:
    """Tap by tap, none reaching before its document: channels [B, C, L-1+T], documents [B, 1, T] -> [B, C, T]."""
    taps, tokens = filters.shape[-1], documents.shape[-1]
    mixed = torch.zeros_like(channels[..., :tokens])
    for back in range(taps):
        stop = channels.shape[-1] - back
        reached = channels[..., stop - tokens : stop] * (documents >= back).to(channels.dtype)
        mixed = mixed + filters[:, taps - 1 - back, None] * reached
    return mixed


def wide(x: Tensor) -> Tensor:
    """At least float32: gates near 1 and small steps of an inner loop do not survive bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
