"""The short causal convolution between a projection and a memory: depthwise, SiLU, carried over cuts by its tail."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_megatron.mixers.base import wide
from atlas_megatron.parallel.context import ALONE, Chain


def convolved(
    qkv: Tensor, taps: Tensor, tail: Tensor | None, positions: Tensor | None = None, tokens: Chain = ALONE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, T, H, 3, K] -> q and k of length 1, v, [B, T, H, K] each, at least float32; the tail for what follows.

    taps [H, 3K, L]: the filter of each channel, the newest token's last. tail [B, 3HK, L-1]: the inputs before the
    first token, as an earlier call left them; None: there are none. positions [B, T]: of packed documents, which a
    filter does not reach out of. tokens: the ranks that the sequence is spread over; tail is then before all of it.
    """
    before = taps.shape[-1] - 1
    channels = qkv.flatten(2).transpose(1, 2)
    tail = channels.new_zeros(*channels.shape[:2], before) if tail is None else tail
    channels = torch.cat([tokens.before(channels, before, -1, tail), channels], -1)
    filters = taps.reshape(-1, 1, taps.shape[-1])
    if positions is None:
        mixed = F.conv1d(channels, filters, groups=channels.shape[1])
    else:
        mixed = _within_documents(channels, filters.squeeze(1), positions.unsqueeze(1))
    mixed = F.silu(mixed)
    q, k, v = wide(mixed.transpose(1, 2)).unflatten(-1, qkv.shape[2:]).unbind(-2)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, channels[..., channels.shape[-1] - before :]


def _within_documents(channels: Tensor, filters: Tensor, positions: Tensor) -> Tensor:
    """The same convolution, tap by tap: channels [B, C, L-1+T], filters [C, L], positions [B, 1, T] -> [B, C, T]."""
    tokens, before = positions.shape[-1], filters.shape[-1] - 1
    out = filters[:, before:] * channels[..., before:]
    for back in range(1, before + 1):
        earlier = channels[..., before - back : before - back + tokens]
        tap = filters[:, before - back, None]
        out = out + tap * earlier * (positions >= back).to(out.dtype)
    return out


def initial_taps(heads: int, head_dim: int, size: int) -> Tensor:
    """Filters of the q, k and v channels of each head, [H, 3K, size], uniform as torch draws a convolution's."""
    bound = size**-0.5
    return torch.empty(heads, 3 * head_dim, size).uniform_(-bound, bound)
