"""Blocks that join memory and attention in one layer: MAG (`A`, memory as a gate) and MAC (`C`, memory as a context).

Dims as in attention_atlas.py; S tokens of a segment, s of them read so far.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention_atlas import AttentionState, WindowAttention
from .configuration_atlas import AtlasConfig
from .kernels_atlas import attention, head_norm, memory_as_gate
from .memory_atlas import AtlasMemory, AtlasState
from .mixer_atlas import Mixer
from .place_atlas import TokenPositions


class _Joined(Mixer):
    """A memory and an attention, and the product of what they give: norm(attention) * silu(norm(memory))."""

    section = "attention"

    @classmethod
    def grows(cls, config: AtlasConfig) -> bool:
        return AtlasMemory.grows(config)

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        self.memory, self.attention = AtlasMemory(config), WindowAttention(config)
        self.memory_gain = nn.Parameter(torch.empty(config.hidden_size))
        self.attention_gain = nn.Parameter(torch.empty(config.hidden_size))
        self.epsilon = config.norm_epsilon

    def start(self) -> dict[str, Tensor]:
        ones = torch.ones(self.memory_gain.shape)
        return {"memory_gain": ones, "attention_gain": ones}

    def join(self, attention: Tensor, memory: Tensor) -> Tensor:
        """[B, T, hidden] both."""
        seen, gate = memory_as_gate(attention, memory, self.attention_gain, self.memory_gain, self.epsilon)
        return seen * gate


@dataclass(frozen=True)
class GateState:
    """What MAG carries over a cut."""

    memory: AtlasState
    attention: AttentionState


class MemoryAsGate(_Joined):
    """MAG: memory and sliding-window attention side by side on one input."""

    states = (GateState, *AtlasMemory.states, *WindowAttention.states)

    @classmethod
    def alike(cls, config: AtlasConfig) -> str:
        return AtlasMemory.alike(config)

    def forward(self, x: Tensor, state: GateState | None, place: TokenPositions) -> tuple[Tensor, GateState]:
        """[B, T, hidden] -> [B, T, hidden] and the state after."""
        memory, kept = self.memory(x, state.memory if state else None, place)
        attention, seen = self.attention(x, state.attention if state else None, place)
        return self.join(attention, memory), GateState(kept, seen)


@dataclass(frozen=True)
class ContextState:
    """What MAC carries over a cut.

    start: the memory before the segment that the next token lies in; memory: as it stands. own, answered: keys and
    values of the segment's tokens so far, as they are and as the memory answers them, [B, H, s, K] each.
    """

    start: AtlasState | None
    memory: AtlasState | None
    own: AttentionState | None
    answered: AttentionState | None


class MemoryAsContext(_Joined):
    """MAC: segment by segment, read the memory, attend over persistent tokens, what was read and the segment; write it.

    A token attends to what was read for itself and for the segment's tokens before it, never after. The memory's read
    of what was written gates the output.
    """

    states = (ContextState, *AtlasMemory.states, *WindowAttention.states)

    @classmethod
    def alike(cls, config: AtlasConfig) -> str:
        return "C layers, whose segments are those of every row"

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__(config)
        memory = config.section("memory")
        self.segment = config.section("attention").segment
        width = memory.heads * memory.head_dim
        self.linear_query = nn.Linear(config.hidden_size, width, bias=False)
        self.linear_read = nn.Linear(width, config.hidden_size, bias=False)
        self.read_gain = nn.Parameter(torch.empty(memory.heads, memory.head_dim))

    def start(self) -> dict[str, Tensor]:
        return super().start() | {"read_gain": torch.ones(self.read_gain.shape)}

    def forward(self, x: Tensor, state: ContextState | None, place: TokenPositions) -> tuple[Tensor, ContextState]:
        """[B, T, hidden] -> [B, T, hidden] and the state after; every row stands at the same position."""
        state, outputs, start = state or ContextState(None, None, None, None), [], 0
        reach, ended = self.memory.reach_in(place.tokens), 0
        while start < place.tokens:
            first = place.first + start
            if reach and start - ended >= reach and first % self.segment == 0 and state.memory:
                # Also what the next segment is answered from: gradients would pass the end by that way.
                memory, ended = state.memory.ended(), start
                state = ContextState(memory, memory, None, None)
            stop = min(start + self.segment - first % self.segment, place.tokens)
            part = TokenPositions(first, stop - start, None, place.first + stop)
            y, state = self._within(x[:, start:stop], state, part)
            outputs.append(y)
            start = stop
        return torch.cat(outputs, 1), state

    def _within(self, x: Tensor, state: ContextState, place: TokenPositions) -> tuple[Tensor, ContextState]:
        """Tokens of one segment."""
        read = self.memory.read(self.linear_query(x).unflatten(-1, self.read_gain.shape), state.start)
        context = self.linear_read(head_norm(read, self.read_gain, self.epsilon).to(x.dtype).flatten(2))

        heads = self.attention
        plain, own_keys, own_values = heads.heads_of(x)
        _, answered_keys, answered_values = heads.heads_of(context)
        turn = heads.rotation(place, x.device)
        own = _extended(state.own, attention.rotate(own_keys, turn), own_values)
        answered = _extended(state.answered, attention.rotate(answered_keys, turn), answered_values)
        q, persistent = attention.rotate(plain, turn), attention.persistent_of(heads.persistent, plain)
        keys, values = (own.keys, answered.keys), (own.values, answered.values)
        y = heads.projected(attention.within_segment(q, keys, values, persistent))

        written, memory = self.memory(y, state.memory, place)
        if place.after % self.segment == 0:
            after = ContextState(memory, memory, None, None)
        else:
            after = ContextState(state.start, memory, own, answered)
        return self.join(y, written), after


def _extended(before: AttentionState | None, keys: Tensor, values: Tensor) -> AttentionState:
    if before is None:
        return AttentionState(keys, values)
    return AttentionState(torch.cat([before.keys, keys], 2), torch.cat([before.values, values], 2))
