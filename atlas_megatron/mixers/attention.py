"""Sliding-window and full attention with rotary positions.

Dims: B batch, T tokens, H heads of this tensor-parallel rank, K head size, W window, L query block, P tokens kept
from before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from atlas_megatron.config import Config
from atlas_megatron.mixers.base import Mixer
from atlas_megatron.mixers.costs import Halo
from atlas_megatron.mixers.linears import MixerLinears


@dataclass(frozen=True)
class AttentionState:
    """The last W-1 tokens read, or all: keys, rotated, and values [B, H, P, K]; tokens read in all."""

    keys: Tensor
    values: Tensor
    position: int


@dataclass(frozen=True)
class Persistent:
    """Learned keys and values [H, 2, n, K] that every query sees besides, and the queries [B, H, T, K] that see them.

    They have no position, so these queries are not rotated: what a token sees of them does not depend on where it is.
    """

    learned: Tensor
    queries: Tensor


class SlidingWindowAttention(Mixer):
    """Causal attention over the last W tokens; heads are split over the tensor-parallel group.

    A row of `linear_qkv` belongs to one head, and a head's rows lie together (its q, k, v), so that a
    shard of the rows is whole heads.
    """

    def build(self, settings: Config, linears: MixerLinears, groups: ProcessGroupCollection) -> None:
        attention, hidden = settings.attention, settings.model.hidden_size
        self.head_dim = attention.head_dim
        self.window = self.reach(settings)
        self.rotary_base = attention.rotary_base
        width = attention.heads * attention.head_dim
        self.linear_qkv = linears.column(hidden, 3 * width, self.config, self.tp_group)
        self.linear_out = linears.row(width, hidden, self.config, self.tp_group)
        self.persistent = None
        if attention.persistent:
            drawn = torch.empty(attention.heads, 2, attention.persistent, attention.head_dim).normal_()
            self.persistent = self.by_head(drawn)

    @staticmethod
    def reach(settings: Config) -> int | None:
        """Tokens that a query sees, itself included; None is all before it."""
        return settings.attention.window

    @classmethod
    def num_params(cls, settings: Config) -> int:
        attention = settings.attention
        width = attention.heads * attention.head_dim
        return 4 * settings.model.hidden_size * width + 2 * attention.persistent * width

    @classmethod
    def flops_per_token(cls, settings: Config) -> tuple[float, float]:
        """Four projections, and 4 x width for each key that a query sees: min(t, window) at token t, and persistent."""
        attention, model = settings.attention, settings.model
        seen = min(cls.reach(settings) or model.seq_length, model.seq_length)
        keys = seen - seen * (seen - 1) / 2 / model.seq_length + attention.persistent
        return attention.heads * attention.head_dim * (8 * model.hidden_size + 4 * keys), 0.0

    @classmethod
    def halos(cls, settings: Config) -> tuple[Halo, ...]:
        """Keys and values."""
        reach = cls.reach(settings)
        return (Halo("attention", reach and reach - 1, cls._key_numbers(settings)),)

    @classmethod
    def state_size(cls, settings: Config) -> int:
        """The keys and values that it keeps."""
        reach, tokens = cls.reach(settings), settings.model.seq_length
        return (tokens if reach is None else min(reach - 1, tokens)) * cls._key_numbers(settings)

    @classmethod
    def growth(cls, settings: Config) -> float:
        """Full attention keeps all keys and values."""
        return 0.0 if cls.reach(settings) else float(cls._key_numbers(settings))

    @classmethod
    def activation_bytes(cls, settings: Config, size: int) -> float:
        """q, k, v and the output, and keys and values of what the ranks to the left have."""
        model, attention, parallel = settings.model, settings.attention, settings.parallel
        tokens, reach = model.seq_length / parallel.context, cls.reach(settings)
        left = min(reach - 1 if reach else model.seq_length, model.seq_length - tokens) / tokens
        return (5 + 2 * left) * (attention.heads * attention.head_dim) * size / parallel.tensor

    @classmethod
    def bytes_at_cuts(cls, settings: Config, cuts: int, read: float, size: int) -> float:
        """Keys and values: of a window at every cut, of full attention all that was read."""
        reach = cls.reach(settings)
        return float(read if reach is None else cuts * reach) * cls._key_numbers(settings) * size

    @classmethod
    def _key_numbers(cls, settings: Config) -> int:
        """Of one token's key and value, of all heads."""
        return 2 * settings.attention.heads * settings.attention.head_dim

    def mix(
        self, hidden_states: Tensor, state: AttentionState | None, positions: Tensor | None = None
    ) -> tuple[Tensor, AttentionState]:
        q, k, v = self.heads_of(hidden_states)
        persistent = self.persistent_for(q)
        tokens = self.shards.tokens
        position = (state.position if state else 0) + tokens.rank * q.shape[2]
        rotation = rotary(position, q.shape[2], self.head_dim, self.rotary_base, q.device)
        q, k = rotate(q, rotation), rotate(k, rotation)
        reach = self.window - 1 if self.window else None
        held = torch.stack((state.keys, state.values)) if state else None
        seen = torch.stack((k, v))
        before = tokens.before(seen, reach, 3, held)
        k, v = seen if before is None else torch.cat([before, seen], 3)
        kept = max(0, k.shape[2] - reach) if reach is not None else 0
        after = AttentionState(k[:, :, kept:], v[:, :, kept:], position + q.shape[2])
        if self.window:
            y = banded_attention(q, k, v, self.window, persistent, positions)
        else:
            y = causal_attention(q, k, v, persistent, positions)
        return self.projected(y), after

    def heads_of(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, B, hidden] -> q, k, v [B, H, T, K], not rotated."""
        qkv, _ = self.linear_qkv(hidden_states)
        q, k, v = qkv.unflatten(-1, (-1, 3, self.head_dim)).permute(3, 1, 2, 0, 4).unbind(0)
        return q, k, v

    def persistent_for(self, queries: Tensor) -> Persistent | None:
        """Of queries that are not rotated; None: there are no persistent tokens."""
        return None if self.persistent is None else Persistent(self.persistent, queries)

    def projected(self, y: Tensor) -> Tensor:
        """[B, H, T, K] -> [T, B, hidden]."""
        return self.linear_out(y.permute(2, 0, 1, 3).flatten(2))[0]


class FullAttention(SlidingWindowAttention):
    """Causal attention over everything before a token: the mixer of a Transformer++."""

    @staticmethod
    def reach(settings: Config) -> int | None:
        return None


def rotary(position: int, tokens: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [T, K/2], float32, of the rotary angles at absolute positions from `position` on."""
    # float64: ten million tokens into a sequence, a float32 angle is wrong by half a radian.
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    positions = torch.arange(position, position + tokens, dtype=torch.float64, device=device)
    angle = positions[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x_i, x_{i+K/2}) of x [..., T, K] by its angle; in float32 or wider, returned in x's dtype."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, persistent: Persistent | None = None, positions: Tensor | None = None
) -> Tensor:
    """Attention of q [B, H, T, K] to k, v [B, H, P+T, K], the last T of which are the queries' own tokens.

    positions [B, T]: of the queries in packed documents, out of which none looks back.
    """
    if q.shape[2] == k.shape[2] and persistent is None and positions is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    query = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
    back = query - torch.arange(k.shape[2], device=q.device)
    seen = back >= 0
    if positions is not None:
        seen = seen & (back <= positions[:, None, :, None])
    return attend(q, k, v, seen, persistent)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, persistent: Persistent | None) -> Tensor:
    """Attention of q [..., H, T, K] to the keys [..., H, R, K] that `seen` [..., T, R] allows, and to `persistent`."""
    if persistent is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    keys, values = persistent.learned.to(q.dtype).unbind(1)
    scale, width = q.shape[-1] ** -0.5, q.shape[-1]
    # One attention over both kinds of keys: the rotated queries meet zeros in the persistent ones, and the other way.
    q = torch.cat([persistent.queries, q], -1)
    keys = F.pad(keys, (0, width)).expand(*k.shape[:-2], -1, -1)
    k = torch.cat([keys, F.pad(k, (width, 0))], -2)
    v = torch.cat([values.expand(*v.shape[:-2], -1, -1), v], -2)
    seen = F.pad(seen, (values.shape[-2], 0), value=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    persistent: Persistent | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Attention of q [B, H, T, K] to the `window` keys that end at each query's own; k, v [B, H, P+T, K].

    The last T keys are the queries' own tokens. Queries are taken in blocks of L = min(window, T): each
    needs only the W-1+L keys up to its end, so that masks and scores grow with T x W, not with T x T.
    positions [B, T]: of the queries in packed documents, out of which none looks back.
    """
    tokens, before = q.shape[2], k.shape[2] - q.shape[2]
    length = min(window, tokens)
    blocks = -(-tokens // length)
    # One block reads from the first key there is; several must all look back equally far.
    reach = before if blocks == 1 else window - 1
    front, back = reach - before, blocks * length - tokens
    q = _in_blocks(F.pad(q, (0, 0, 0, back)), length, length)
    k, v = (_in_blocks(F.pad(t, (0, 0, front, back)), reach + length, length) for t in (k, v))
    if persistent is not None:
        queries = _in_blocks(F.pad(persistent.queries, (0, 0, 0, back)), length, length)
        persistent = Persistent(persistent.learned, queries)

    query = torch.arange(length, device=q.device)[:, None]
    key = torch.arange(reach + length, device=q.device) - reach
    band = (key <= query) & (key > query - window)
    start = torch.arange(0, blocks * length, length, device=q.device)[:, None, None]
    seen = band & (start + key >= -before)  # no key before the first
    seen = seen[:, None, None]  # [blocks, B, H, L, reach + L]
    if positions is not None:
        own = F.pad(positions, (0, back)).unflatten(1, (blocks, length)).transpose(0, 1)
        seen = seen & (query - key <= own[:, :, None, :, None])
    y = attend(q, k, v, seen, persistent)
    return y.movedim(0, 2).flatten(2, 3)[:, :, :tokens]


def _in_blocks(x: Tensor, size: int, step: int) -> Tensor:
    """[B, H, T, K] -> the blocks of `size` tokens that begin `step` apart, [blocks, B, H, size, K]."""
    return x.unfold(2, size, step).movedim(2, 0).mT
