"""Sliding-window (`*`) and full (`F`) attention with rotary positions.

Dims: B batch, T tokens, H heads, K head size, W window, P tokens kept from before, n persistent tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from .configuration_atlas import AtlasConfig
from .kernels_atlas import attention
from .mixer_atlas import Mixer
from .place_atlas import TokenPositions, of_any_length


@dataclass(frozen=True)
class AttentionState:
    """The last W-1 tokens read, or all: keys, rotated, and values [B, H, P, K]."""

    keys: Tensor
    values: Tensor


class WindowAttention(Mixer):
    """Causal attention over the last W tokens. A row of `linear_qkv` belongs to one head: its q, k, v.

    persistent [H, 2, n, K]: learned keys and values that every query sees besides. They have no position, so the
    queries meet them as they are, not rotated.
    """

    section = "attention"
    states = (AttentionState,)
    unrolled = False
    windowed: ClassVar[bool] = True

    @classmethod
    def grows(cls, config: AtlasConfig) -> bool:
        return not cls.windowed

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        section = config.section("attention")
        self.head_dim, self.rotary_base = section.head_dim, section.rotary_base
        self.window = section.window if self.windowed else None
        width = section.heads * section.head_dim
        self.linear_qkv = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.linear_out = nn.Linear(width, config.hidden_size, bias=False)
        self.persistent = None
        if section.persistent:
            self.persistent = nn.Parameter(torch.empty(section.heads, 2, section.persistent, section.head_dim))

    def start(self) -> dict[str, Tensor]:
        return {} if self.persistent is None else {"persistent": torch.randn(self.persistent.shape)}

    def forward(self, x: Tensor, state: AttentionState | None, place: TokenPositions) -> tuple[Tensor, AttentionState]:
        """[B, T, hidden] -> [B, T, hidden] and the state after."""
        unrotated, k, v = self.heads_of(x)
        turn = self.rotation(place, x.device)
        q, k = attention.rotate(unrotated, turn), attention.rotate(k, turn)
        if state is not None:
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        kept = max(0, k.shape[2] - (self.window - 1)) if self.window and not of_any_length(x) else 0
        # Copies: views would keep what has left the window.
        after = AttentionState(k[:, :, kept:].clone(), v[:, :, kept:].clone()) if kept else AttentionState(k, v)
        return self.projected(self.attended(q, unrotated, k, v, place.documents)), after

    def attended(self, q: Tensor, unrotated: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        """q [B, H, T, K] over k, v [B, H, P+T, K], whose last T are the queries' own tokens."""
        persistent = attention.persistent_of(self.persistent, unrotated)
        window = self.window
        if window and not of_any_length(q):
            if q.shape[2] > window:
                return attention.banded_attention(q, k, v, window, persistent, documents)
            if k.shape[2] <= window:
                window = None  # which then sees all
        return attention.causal_attention(q, k, v, persistent, documents, window)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, hidden] -> q, k, v [B, H, T, K], not rotated."""
        q, k, v = self.linear_qkv(x).unflatten(-1, (-1, 3, self.head_dim)).permute(3, 0, 2, 1, 4).unbind(0)
        return q, k, v

    def projected(self, y: Tensor) -> Tensor:
        """[B, H, T, K] -> [B, T, hidden]."""
        return self.linear_out(y.transpose(1, 2).flatten(2))

    def rotation(self, place: TokenPositions, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, 1, T, K/2] of the rotary angles of a call's tokens."""
        return attention.rotary(place.positions(device)[:, None], self.head_dim, self.rotary_base)


class FullAttention(WindowAttention):
    """Causal attention over everything before a token; its state grows with what was read."""

    windowed = False
