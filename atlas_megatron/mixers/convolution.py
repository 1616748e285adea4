"""The short causal convolution between a projection and a memory, over the ranks that a sequence is spread over."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atlas_kernels import late_keys, short_convolution
from atlas_megatron.parallel.context import ALONE, Chain


def convolved(
    qkv: Tensor,
    taps: Tensor,
    tail: Tensor | None,
    positions: Tensor | None = None,
    tokens: Chain = ALONE,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`short_convolution` of this rank's tokens [B, T, H, 3, K]; the tail [B, 3HK, L-1] for what follows.

    tail: the inputs before the first token of the whole sequence, as an earlier call left them; None: there are none.
    """
    before = tail
    if tokens.size > 1:
        channels, reach = qkv.flatten(2).transpose(1, 2), taps.shape[-1] - 1
        tail = channels.new_zeros(*channels.shape[:2], reach) if tail is None else tail
        before = tokens.before(channels, reach, -1, tail)
    return short_convolution(qkv, taps, before, positions, impl)


def initial_taps(heads: int, head_dim: int, size: int) -> Tensor:
    """Filters of the q, k and v channels of each head, [H, 3K, size], uniform as torch draws a convolution's."""
    bound = size**-0.5
    return torch.empty(heads, 3 * head_dim, size).uniform_(-bound, bound)


@torch.no_grad()
def start_late_keys(projection: nn.Module, taps: nn.Parameter) -> None:
    """`late_keys` of a layer as it was drawn, this rank's heads: a projection to q, k, v and output gate by head."""
    weight = projection.get_parameter("weight")
    rows, filters = late_keys(weight.unflatten(0, (len(taps), 4, -1)), taps)
    weight.copy_(rows.flatten(0, 2))
    taps.copy_(filters)
