"""From a segment's tokens to its chunks, with their memories side by side, and back.

Dims: B batch, H heads, G = B x H, N chunks of a segment, C tokens of a chunk, W window, I = C + W - 1 sources of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .decays import pair_band, source_band
from .rule import Gates

# (halo [B, W-1, H, ...], tokens [B, N*C, H, ...], N) -> (sources of each chunk [N, G, I, ...], the halo that follows).
Windows = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def windows(halo: Tensor, tokens: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """`Windows`."""
    before, length = halo.shape[1], tokens.shape[1] // chunks
    t = torch.cat([halo, tokens], 1)
    # A copy: a view would keep the whole segment alive for as long as the state lives.
    return _Windows.apply(t, length + before, length), t[:, t.shape[1] - before :].clone()


@dataclass(frozen=True)
class Layout:
    """From [B, N*C, H, ...] to chunks with their memories side by side, [N, G, C, ...]."""

    chunks: int
    tokens: int
    windows: Windows = windows

    def by_chunk(self, t: Tensor) -> Tensor:
        return t.unflatten(1, (self.chunks, self.tokens)).movedim(3, 1).movedim(2, 0).flatten(1, 2)

    def by_token(self, t: Tensor, batch: int, heads: int) -> Tensor:
        """The inverse: [N, G, C, ...] -> [B, N*C, H, ...]."""
        return t.unflatten(1, (batch, heads)).movedim(0, 1).movedim(3, 2).flatten(1, 2)

    def with_halo(self, halo: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The sources of each chunk [N, G, I, ...] and the halo that follows the segment [B, W-1, H, ...]."""
        return self.windows(halo, t, self.chunks)


def gates_by_chunk(
    gates: Gates, tokens: int, sources: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Alpha, eta, theta [N, G, C] of the N chunks of `tokens` tokens, and the Omega gates [N, G, C, I].

    sources: source gates in their chunks [N, G, I]; None with pair gates.
    """
    layout = Layout(gates.alpha.shape[1] // tokens, tokens)
    band = pair_band(layout.by_chunk(gates.gamma)) if sources is None else source_band(sources, tokens)
    return (layout.by_chunk(gates.alpha), layout.by_chunk(gates.eta), layout.by_chunk(gates.theta)), band


class _Windows(torch.autograd.Function):
    """[B, T, H, ...] -> [N, B H, size, ...], one window every `step` tokens; torch's own backward is slow."""

    @staticmethod
    def forward(ctx, t: Tensor, size: int, step: int) -> Tensor:
        ctx.shape, ctx.size, ctx.step = t.shape, size, step
        return t.unfold(1, size, step).movedim(-1, 3).transpose(0, 1).flatten(1, 2)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (batch, length, heads, *rest), size = ctx.shape, ctx.size
        chunks = len(grad)
        step = ctx.step if chunks > 1 else size
        windows = grad.unflatten(1, (batch, heads)).movedim(0, 1).transpose(2, 3)  # [B, N, size, H, ...]
        turns = -(-size // step)
        sums = grad.new_zeros(batch, chunks - 1 + turns, step, heads, *rest)
        # One addition for all chunks: as many as chunks that a window reaches over, whatever the length.
        for j in reversed(range(turns)):
            part = windows[:, :, j * step : (j + 1) * step]
            sums[:, j : j + chunks, : part.shape[2]].add_(part)
        return sums.flatten(1, 2)[:, :length], None, None
