"""Blocks that join memory and attention in one layer: MAG (memory as a gate) and MAC (memory as a context).

Titans (arXiv 2501.00663) sections 4.1 and 4.2; MAL is a pattern of two layers. Dims as in attention.py; S tokens of a
segment.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from atlas_kernels.attention import persistent_of, rotate, within_segment
from atlas_kernels.gated_norm import head_norm, memory_as_gate
from atlas_kernels.layer_start import weight_shapes
from atlas_megatron.config import Config
from atlas_megatron.mixers.attention import AttentionState, SlidingWindowAttention
from atlas_megatron.mixers.base import Mixer
from atlas_megatron.mixers.costs import FLOAT, Halo, Matrix
from atlas_megatron.mixers.linears import MixerLinears
from atlas_megatron.mixers.memory import AtlasMixer, AtlasState
from atlas_megatron.mixers.reach import ended
from atlas_megatron.parallel.scan import Shards


class _Joined(Mixer):
    """A memory and an attention, and the product of what they give: norm(attention) * silu(norm(memory))."""

    replicated = ("memory_gain", "attention_gain")
    memory_shards: ClassVar[Shards | None] = None  # of its memory; None: as this layer's own

    def build(self, settings: Config, linears: MixerLinears, groups: ProcessGroupCollection) -> None:
        hidden = settings.model.hidden_size
        slot = (self.config, linears, hidden, self.layer_number, groups, 0, settings)
        self.memory = AtlasMixer(*slot, shards=self.memory_shards)
        self.attention = SlidingWindowAttention(*slot)
        self.memory_gain = self.on_every_rank(torch.ones(hidden))
        self.attention_gain = self.on_every_rank(torch.ones(hidden))

    @classmethod
    def num_params(cls, settings: Config) -> int:
        joined = AtlasMixer.num_params(settings) + SlidingWindowAttention.num_params(settings)
        return joined + 2 * settings.model.hidden_size

    @classmethod
    def matrices(cls, settings: Config) -> tuple[Matrix, ...]:
        parts = {"memory": AtlasMixer, "attention": SlidingWindowAttention}
        return tuple(
            replace(matrix, name=f"{name}.{matrix.name}")
            for name, part in parts.items()
            for matrix in part.matrices(settings)
        )

    @classmethod
    def replicated_params(cls, settings: Config) -> int:
        """The memory's, and the two gains."""
        return AtlasMixer.replicated_params(settings) + 2 * settings.model.hidden_size

    @classmethod
    def constant_flops(cls, settings: Config) -> float:
        return AtlasMixer.constant_flops(settings)

    @classmethod
    def state_numbers(cls, settings: Config, position: int) -> int:
        return AtlasMixer.state_numbers(settings, position)

    @classmethod
    def growth(cls, settings: Config) -> float:
        return AtlasMixer.growth(settings)

    @classmethod
    def kept_numbers(cls, settings: Config, tokens: int) -> float:
        return AtlasMixer.kept_numbers(settings, tokens)

    @classmethod
    def bytes_at_cuts(cls, settings: Config, cuts: int, read: float, size: int) -> float:
        return AtlasMixer.bytes_at_cuts(settings, cuts, read, size)

    def join(self, attention: Tensor, memory: Tensor) -> Tensor:
        """[T, B, hidden] both."""
        epsilon = self.config.layernorm_epsilon
        seen, gate = memory_as_gate(attention, memory, self.attention_gain, self.memory_gain, epsilon)
        if self.mode.measure:
            self._measure(seen, gate)
        return seen * gate

    @torch.no_grad()
    def _measure(self, attention: Tensor, gate: Tensor) -> None:
        """memory_share in [0, 1]: what the output loses when the gate is held at its mean over tokens, beside what it
        loses when the attention is. 0: the memory is a constant, however large."""
        without_memory = (attention * (gate - gate.mean(0, keepdim=True))).square().mean()
        without_attention = ((attention - attention.mean(0, keepdim=True)) * gate).square().mean()
        share = without_memory / (without_memory + without_attention)
        self.measurements = {"memory_share": share.float()}


@dataclass(frozen=True)
class GateState:
    """What MAG carries over a cut."""

    memory: AtlasState
    attention: AttentionState


class MemoryAsGate(_Joined):
    """MAG: memory and sliding-window attention side by side on one input (paper Fig 3)."""

    @classmethod
    def flops_per_token(cls, settings: Config) -> tuple[float, float]:
        memory, inner = AtlasMixer.flops_per_token(settings)
        return memory + SlidingWindowAttention.flops_per_token(settings)[0], inner

    @classmethod
    def linears(cls, settings: Config) -> tuple[int, int]:
        """Those of both."""
        columns, rows = AtlasMixer.linears(settings)
        more, others = SlidingWindowAttention.linears(settings)
        return columns + more, rows + others

    @classmethod
    def halos(cls, settings: Config) -> tuple[Halo, ...]:
        return (*AtlasMixer.halos(settings), *SlidingWindowAttention.halos(settings))

    @classmethod
    def exchanged_numbers(cls, settings: Config) -> int:
        return AtlasMixer.exchanged_numbers(settings)

    @classmethod
    def state_size(cls, settings: Config) -> int:
        return AtlasMixer.state_size(settings) + SlidingWindowAttention.state_size(settings)

    @classmethod
    def activation_bytes(cls, settings: Config, size: int) -> float:
        """Those of both, and both outputs."""
        both = AtlasMixer.activation_bytes(settings, size) + SlidingWindowAttention.activation_bytes(settings, size)
        return both + 2 * settings.model.hidden_size * size

    @classmethod
    def bytes_at_cuts(cls, settings: Config, cuts: int, read: float, size: int) -> float:
        window = SlidingWindowAttention.bytes_at_cuts(settings, cuts, read, size)
        return super().bytes_at_cuts(settings, cuts, read, size) + window

    def mix(
        self, hidden_states: Tensor, state: GateState | None, positions: Tensor | None = None
    ) -> tuple[Tensor, GateState]:
        memory, kept = self.memory.mix(hidden_states, state.memory if state else None, positions)
        attention, seen = self.attention.mix(hidden_states, state.attention if state else None, positions)
        return self.join(attention, memory), GateState(kept, seen)

    def final_state(self, after: GateState) -> GateState:
        return GateState(self.memory.final_state(after.memory), self.attention.final_state(after.attention))


@dataclass(frozen=True)
class ContextState:
    """What MAC carries over a cut.

    start: the memory before the segment that `position` lies in; memory: as it stands. keys, values [B, 2, H, s, K]: of
    the segment's tokens so far, as they are and as the memory answers them.
    """

    start: AtlasState | None
    memory: AtlasState | None
    keys: Tensor | None
    values: Tensor | None
    position: int


class MemoryAsContext(_Joined):
    """MAC: segment by segment, read the memory, attend over persistent tokens, what was read and the segment; write it.

    A token attends to what was read for itself and for the segment's tokens before it, never after. The memory's read
    of what was written gates the output.
    """

    # Under context parallelism this layer hands the memory on as a whole: each segment writes what it has read.
    memory_shards = Shards()

    def build(self, settings: Config, linears: MixerLinears, groups: ProcessGroupCollection) -> None:
        super().build(settings, linears, groups)
        hidden, memory = settings.model.hidden_size, settings.memory
        self.segment = settings.attention.segment
        width = memory.heads * memory.head_dim
        self.linear_query = linears.column(hidden, width, self.config, self.tp_group)
        self.linear_read = linears.row(width, hidden, self.config, self.tp_group)
        self.read_gain = self.by_head(torch.ones(memory.heads, memory.head_dim))

    @classmethod
    def num_params(cls, settings: Config) -> int:
        width = settings.memory.heads * settings.memory.head_dim
        return super().num_params(settings) + 2 * settings.model.hidden_size * width + width

    @classmethod
    def matrices(cls, settings: Config) -> tuple[Matrix, ...]:
        """Those of memory and attention; its queries, and the read's projection."""
        width, hidden = settings.memory.heads * settings.memory.head_dim, settings.model.hidden_size
        own = Matrix("linear_query.weight", width, hidden, 0), Matrix("linear_read.weight", hidden, width, 1)
        return (*super().matrices(settings), *own)

    @classmethod
    def flops_per_token(cls, settings: Config) -> tuple[float, float]:
        """Memory and attention, the read before it, keys and values of what was read."""
        model, memory, attention = settings.model, settings.memory, settings.attention
        own, inner = AtlasMixer.flops_per_token(settings)
        read = 2.0 * memory.heads * sum(rows * cols for rows, cols in weight_shapes(memory))
        segment = min(attention.segment, model.seq_length)
        keys = segment + 1 + attention.persistent
        heads = attention.heads * attention.head_dim * (14 * model.hidden_size + 4 * keys)
        return own + heads + 4 * model.hidden_size * memory.heads * memory.head_dim + read, inner + read

    @classmethod
    def scan_flops(cls, settings: Config) -> float:
        """All: a segment is answered from the memory after the one before."""
        return cls.flops_per_token(settings)[0]

    @classmethod
    def linears(cls, settings: Config) -> tuple[int, int]:
        """Those of memory and attention; its queries, and keys and values of what was read; the read's projection."""
        return AtlasMixer.linears(settings)[0] + 3 * settings.model.hidden_size, 3

    @classmethod
    def state_numbers(cls, settings: Config, position: int) -> int:
        """The memory's, and what its convolutions still need."""
        memory = settings.memory
        tail = 3 * memory.head_dim * (memory.conv_size - 1)
        return super().state_numbers(settings, position) + memory.heads * tail

    @classmethod
    def state_size(cls, settings: Config) -> int:
        """The memory's at the end of a segment."""
        return AtlasMixer.state_size(settings)

    @classmethod
    def activation_bytes(cls, settings: Config, size: int) -> float:
        """Those of memory and attention and both outputs; the read, and the keys and values of what was read."""
        memory, attention, tensor = settings.memory, settings.attention, settings.parallel.tensor
        width, seen = memory.heads * memory.head_dim, attention.heads * attention.head_dim
        both = AtlasMixer.activation_bytes(settings, size) + 5 * seen * size / tensor
        return both + 2 * settings.model.hidden_size * size + (2 * width * FLOAT + 2 * seen * size) / tensor

    def mix(
        self, hidden_states: Tensor, state: ContextState | None, positions: Tensor | None = None
    ) -> tuple[Tensor, ContextState]:
        if positions is not None:
            raise ValueError("packed documents were given to a C layer, whose segments do not follow them; unpack them")
        state, chain = state or ContextState(None, None, None, None, 0), self.shards.tokens
        if chain.rank > 0:
            state = self._received(hidden_states, state)
        outputs, start, reach = [], 0, self.memory.gradient_reach if torch.is_grad_enabled() else 0
        while start < hidden_states.shape[0]:
            if reach and state.position % self.segment == 0 and state.memory and state.memory.memory:
                # In whole segments: what the next one is answered from is the memory after the last.
                if state.position // reach > (state.position - self.segment) // reach:
                    memory = AtlasState(ended(state.memory.memory), state.memory.tail)
                    state = ContextState(memory, memory, None, None, state.position)
            stop = start + self.segment - state.position % self.segment
            y, state = self._within(hidden_states[start:stop], state)
            outputs.append(y)
            start = stop
        y = torch.cat(outputs)
        if chain.rank < chain.size - 1:
            assert state.memory is not None
            y = chain.pass_on(y, self.memory.all_to_message(state.memory))
        return y, state

    def _received(self, hidden_states: Tensor, first: ContextState) -> ContextState:
        """The state before this rank's tokens, whole segments as those of every rank; `first`: before the sequence."""
        tokens, chain = hidden_states.shape[0], self.shards.tokens
        if first.position % self.segment or tokens % self.segment:
            raise ValueError(
                f"context-parallel shards of {tokens} tokens from position {first.position} on do not end where "
                f"attention.segment={self.segment} does; give whole segments to each rank"
            )
        position = first.position + chain.rank * tokens
        empty = self.memory.empty_layer_state(hidden_states.shape[1], position)
        message = chain.receive(self.memory.all_to_message(empty), hidden_states, first)
        memory = self.memory.all_from_message(empty, message)
        return ContextState(memory, memory, None, None, position)

    def _within(self, hidden_states: Tensor, state: ContextState) -> tuple[Tensor, ContextState]:
        """Tokens of one segment."""
        queries = self.linear_query(hidden_states)[0].transpose(0, 1).unflatten(-1, self.read_gain.shape)
        read = head_norm(self.memory.read(queries, state.start), self.read_gain, self.config.layernorm_epsilon)
        context = self.linear_read(read.to(hidden_states.dtype).flatten(2).transpose(0, 1).contiguous())[0]

        attention = self.attention
        q, *own = attention.heads_of(hidden_states)
        persistent = persistent_of(attention.persistent, q)
        _, *answered = attention.heads_of(context)
        keys, values = (torch.stack(pair, 1) for pair in zip(own, answered, strict=True))
        rotation = attention.rotation(state.position, q)
        q, keys = rotate(q, rotation), rotate(keys, rotation)
        if state.keys is not None and state.values is not None:
            keys, values = torch.cat([state.keys, keys], 3), torch.cat([state.values, values], 3)
        y = attention.projected(within_segment(q, keys.unbind(1), values.unbind(1), persistent))

        written, memory = self.memory.mix(y, state.memory)
        position = state.position + hidden_states.shape[0]
        if position % self.segment == 0:
            after = ContextState(memory, memory, None, None, position)
        else:
            after = ContextState(state.start, memory, keys, values, position)
        return self.join(y, written), after
