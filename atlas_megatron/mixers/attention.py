"""Sliding-window and full attention with rotary positions.

Dims: B batch, T tokens, H heads of this tensor-parallel rank, K head size, W window, P tokens kept from before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from atlas_kernels.attention import banded_attention, causal_attention, persistent_of, rotary, rotate
from atlas_megatron.config import Config
from atlas_megatron.mixers.base import Mixer
from atlas_megatron.mixers.costs import Halo, Matrix, fused
from atlas_megatron.mixers.linears import MixerLinears


@dataclass(frozen=True)
class AttentionState:
    """The last W-1 tokens read, or all: keys, rotated, and values [B, H, P, K]; tokens read in all."""

    keys: Tensor
    values: Tensor
    position: int


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
    def matrices(cls, settings: Config) -> tuple[Matrix, ...]:
        return fused("linear_qkv", 3, settings.attention, settings.model.hidden_size)

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
        persistent = persistent_of(self.persistent, q)
        tokens = self.shards.tokens
        position = (state.position if state else 0) + tokens.rank * q.shape[2]
        rotation = self.rotation(position, q)
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

    def rotation(self, position: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [T, K/2] for q [B, H, T, K], whose first token stands at `position`."""
        positions = torch.arange(position, position + q.shape[2], device=q.device)
        return rotary(positions, self.head_dim, self.rotary_base)

    def projected(self, y: Tensor) -> Tensor:
        """[B, H, T, K] -> [T, B, hidden]."""
        return self.linear_out(y.permute(2, 0, 1, 3).flatten(2))[0]


class FullAttention(SlidingWindowAttention):
    """Causal attention over everything before a token: the mixer of a Transformer++."""

    @staticmethod
    def reach(settings: Config) -> int | None:
        return None
