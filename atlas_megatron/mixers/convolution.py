"""The short causal convolution between a projection and a memory, over the ranks that a sequence is spread over."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atlas_kernels import copying, late_keys, short_convolution
from atlas_megatron.config import DeltaConfig, MemoryConfig
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


@torch.no_grad()
def start_edges(section: MemoryConfig | DeltaConfig, projection: nn.Module, taps: nn.Parameter, out: nn.Module) -> None:
    """`late_keys` and `copying` of a layer as it was drawn, where its section asks for them; this rank's heads.

    projection: to q, k, v and output gate by head; out: the output matrix, whose inputs are heads.
    """
    weight = projection.get_parameter("weight")
    # Core's weights lie on the CPU until the model is built.
    rows, filters = weight.unflatten(0, (len(taps), 4, -1)), taps.detach().to(weight.device)
    if section.late_keys:
        rows, filters = late_keys(rows, filters)
    if section.copy_start:
        filters, matrix = copying(rows, filters)
        out.get_parameter("weight").copy_(matrix)
    weight.copy_(rows.flatten(0, 2))
    taps.copy_(filters)
