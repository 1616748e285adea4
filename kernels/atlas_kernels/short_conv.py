"""The short causal convolution between a projection and a memory: what makes q, k and v (paper Fig 3).

Dims: B batch, T tokens, H heads, K head size, D hidden size, L taps.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import at_least_float32

# Where a start gives a filter an order of its own: the share that it keeps of what was drawn.
OWN_TOKEN = 0.2


def short_convolution(
    qkv: Tensor, taps: Tensor, before: Tensor | None, positions: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A causal depthwise convolution, SiLU, and length 1 for q and k:

        c_t = silu(sum_{j=0..L-1} taps_{L-1-j} x_{t-j})        q, k = c / |c|        v = c

    qkv [B, T, H, 3, K]: x of q, k and v. taps [H, 3K, L]: the filter of each channel, the newest token's last. before
    [B, 3HK, L-1]: the inputs before the first token; None at the start of a sequence. positions [B, T] int64: each
    token's in its own document, which a filter does not reach out of; None: all is one. impl: "triton" (one GPU
    kernel), "auto" (that on a GPU), anything else: torch; float64 is torch's.

    Returns q, k, v [B, T, H, K], at least float32, and what is `before` for the tokens that follow.
    """
    reach = taps.shape[-1] - 1
    if before is None:
        before = qkv.new_zeros(qkv.shape[0], taps[..., 0].numel(), reach)
    if gpu := gpu_edges(qkv, impl):
        newest = qkv[:, max(0, qkv.shape[1] - reach) :].flatten(2).transpose(1, 2)
        kept = before[..., before.shape[-1] - (reach - newest.shape[-1]) :]
        return (*gpu.short_convolution(qkv, taps, before, positions), torch.cat([kept, newest], -1))
    channels = torch.cat([before, qkv.flatten(2).transpose(1, 2)], -1)
    filters = taps.flatten(0, 1)
    if positions is None:
        mixed = F.conv1d(channels, filters.unsqueeze(1), groups=channels.shape[1])
    else:
        mixed = _within_documents(channels, filters, positions.unsqueeze(1))
    mixed = F.silu(mixed).transpose(1, 2)
    q, k, v = at_least_float32(mixed).unflatten(-1, qkv.shape[2:]).unbind(-2)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, channels[..., channels.shape[-1] - reach :]


def initial_taps(heads: int, head_dim: int, size: int) -> Tensor:
    """Filters of the q, k and v channels of each head, [H, 3K, L], float32; uniform as torch draws a convolution's."""
    bound = size**-0.5
    return torch.empty(heads, 3 * head_dim, size).uniform_(-bound, bound)


def late_keys(projection: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """A start in which the key of a token is the query of the token before it, so that a memory begins by answering
    what followed its query, and has not to find this by training.

    projection [H, 3 or more, K, D]: drawn rows of q, k and more; taps [H, 3K, L]: drawn filters, L > 1. Returns both
    with the keys' changed: their rows are the queries', their filters the queries' one token later. Of its own token a
    key has OWN_TOKEN of what was drawn: a first token has no other, and its key is brought to length 1.
    """
    queries, drawn = (part for part in taps.unflatten(1, (3, -1)).unbind(1)[:2])
    late = torch.cat([queries[..., 1:], OWN_TOKEN * drawn[..., -1:]], -1)
    channels = taps.unflatten(1, (3, -1)).clone()
    channels[:, 1] = late
    rows = projection.clone()
    rows[:, 1] = rows[:, 0]
    return rows, channels.flatten(1, 2)


def copying(projection: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """A start in which what is read, once a memory has learned it, is the token that its value was.

    projection [H, 4, K, D]: drawn rows of q, k, v and output gate; taps [H, 3K, L]: drawn filters. Returns the filters
    with the values' own tap at one and the others OWN_TOKEN of what was drawn, and the output matrix [D, H K]: the
    transpose of the values' rows.
    """
    channels = taps.unflatten(1, (3, -1)).clone()
    channels[:, 2] *= OWN_TOKEN
    channels[:, 2, :, -1] += 1.0
    return channels.flatten(1, 2), projection[:, 2].flatten(0, 1).mT


def _within_documents(channels: Tensor, filters: Tensor, positions: Tensor) -> Tensor:
    """The same convolution, tap by tap: channels [B, C, L-1+T], filters [C, L], positions [B, 1, T] -> [B, C, T]."""
    tokens, reach = positions.shape[-1], filters.shape[-1] - 1
    out = filters[:, reach:] * channels[..., reach:]
    for back in range(1, reach + 1):
        earlier = channels[..., reach - back : reach - back + tokens]
        tap = filters[:, reach - back, None]
        out = out + tap * earlier * (positions >= back).to(out.dtype)
    return out


def gpu_edges(x: Tensor, impl: str) -> ModuleType | None:
    """The Triton kernels of the convolution and of the gated norm, where they take this call; None: torch does.

    x: any tensor of the call. impl: as for `short_convolution`.
    """
    if x.dtype == torch.float64 or not (x.is_cuda if impl == "auto" else impl == "triton"):
        return None
    try:
        # By its name: this file also travels with an exported model.
        return importlib.import_module("atlas_kernels.gpu.edges")
    except ModuleNotFoundError:  # an exported model, where the package is not installed
        return None
