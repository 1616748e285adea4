"""Sliding-window (`*`) and full (`F`) attention with rotary positions.

Dims: B batch, T tokens, H heads, K head size, W window, P tokens kept from before, L query block, n persistent tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_atlas import AtlasConfig
from .mixer_atlas import Mixer
from .place_atlas import Place, of_any_length


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
        attention = config.section("attention")
        self.head_dim, self.rotary_base = attention.head_dim, attention.rotary_base
        self.window = attention.window if self.windowed else None
        width = attention.heads * attention.head_dim
        self.linear_qkv = nn.Linear(config.hidden_size, 3 * width, bias=False)
        self.linear_out = nn.Linear(width, config.hidden_size, bias=False)
        self.persistent = None
        if attention.persistent:
            self.persistent = nn.Parameter(torch.empty(attention.heads, 2, attention.persistent, attention.head_dim))

    def start(self) -> dict[str, Tensor]:
        return {} if self.persistent is None else {"persistent": torch.randn(self.persistent.shape)}

    def forward(self, x: Tensor, state: AttentionState | None, place: Place) -> tuple[Tensor, AttentionState]:
        """[B, T, hidden] -> [B, T, hidden] and the state after."""
        unrotated, k, v = self.heads_of(x)
        turn = self.rotation(place, x.device)
        q, k = rotate(unrotated, turn), rotate(k, turn)
        if state is not None:
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
        kept = max(0, k.shape[2] - (self.window - 1)) if self.window and not of_any_length(x) else 0
        # Copies: views would keep what has left the window.
        after = AttentionState(k[:, :, kept:].clone(), v[:, :, kept:].clone()) if kept else AttentionState(k, v)
        return self.projected(self.attended(q, unrotated, k, v, place.documents)), after

    def attended(self, q: Tensor, unrotated: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        """q [B, H, T, K] over k, v [B, H, P+T, K], whose last T are the queries' own tokens."""
        tokens, total = q.shape[2], k.shape[2]
        if self.window and not of_any_length(q) and tokens > self.window:
            return self._in_blocks(q, unrotated, k, v, documents)
        if total == tokens and self.persistent is None and documents is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        back = torch.arange(total - tokens, total, device=q.device)[:, None] - torch.arange(total, device=q.device)
        seen = back >= 0
        if self.window:
            seen = seen & (back < self.window)
        if documents is not None:
            seen = seen & (back <= documents[:, None, :, None])
        return self.attend(q, unrotated, k, v, seen)

    def _in_blocks(self, q: Tensor, unrotated: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        """Queries in blocks of W, each over the 2W-1 keys up to its end: cost grows with T x W, not with T x T."""
        window, tokens, before = self.window, q.shape[2], k.shape[2] - q.shape[2]
        assert window is not None
        blocks = -(-tokens // window)
        behind, ahead = blocks * window - tokens, window - 1 - before

        def cut(t: Tensor, size: int) -> Tensor:  # [B, H, ..., K] -> [B, blocks, H, size, K]
            return t.unfold(2, size, window).permute(0, 2, 1, 4, 3)

        q, unrotated = (cut(F.pad(t, (0, 0, 0, behind)), window) for t in (q, unrotated))
        k, v = (cut(F.pad(t, (0, 0, ahead, behind)), 2 * window - 1) for t in (k, v))
        query = torch.arange(window, device=q.device)[:, None] + window - 1
        key = torch.arange(2 * window - 1, device=q.device)
        back = query - key
        first = torch.arange(0, blocks * window, window, device=q.device)[:, None, None]
        seen = (back >= 0) & (back < window) & (first + key >= ahead)  # no key before the first there is
        seen = seen[None, :, None]  # [B, blocks, H, W, 2W-1]
        if documents is not None:
            own = F.pad(documents, (0, behind)).unflatten(1, (blocks, window))
            seen = seen & (back <= own[:, :, None, :, None])
        y = self.attend(q, unrotated, k, v, seen)
        return y.transpose(1, 2).flatten(2, 3)[:, :, :tokens]

    def attend(self, q: Tensor, unrotated: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        """Attention of q [..., H, T, K] to the keys [..., H, R, K] that `seen` [..., T, R] allows, and to persistent
        ones."""
        if self.persistent is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        keys, values = self.persistent.to(q.dtype).unbind(1)
        width, learned = q.shape[-1], (*k.shape[:-2], -1, -1)
        # One attention over both kinds of keys: rotated queries meet zeros in the persistent ones, and the other way.
        k = torch.cat([F.pad(keys, (0, width)).expand(learned), F.pad(k, (width, 0))], -2)
        v = torch.cat([values.expand(learned), v], -2)
        seen = F.pad(seen, (values.shape[-2], 0), value=True)
        q = torch.cat([unrotated, q], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=width**-0.5)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, hidden] -> q, k, v [B, H, T, K], not rotated."""
        q, k, v = self.linear_qkv(x).unflatten(-1, (-1, 3, self.head_dim)).permute(3, 0, 2, 1, 4).unbind(0)
        return q, k, v

    def projected(self, y: Tensor) -> Tensor:
        """[B, H, T, K] -> [B, T, hidden]."""
        return self.linear_out(y.transpose(1, 2).flatten(2))

    def rotation(self, place: Place, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, 1, T, K/2] of the rotary angles of a call's tokens."""
        # float64: ten million tokens into a sequence, a float32 angle is wrong by half a radian.
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device)
        frequency = self.rotary_base ** (-pairs / self.head_dim)
        angle = (place.positions(device).double().unsqueeze(-1) * frequency).unsqueeze(1)
        return angle.cos().float(), angle.sin().float()


class FullAttention(WindowAttention):
    """Causal attention over everything before a token; its state grows with what was read."""

    windowed = False


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i+K/2}) of x [..., T, K] by its angle; in float32 or wider, returned in x's dtype."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
