"""The states of many texts, each in a row of fixed size: what a server keeps between two steps of a batch.

A cache holds one batch whose rows advance together. A server takes rows in and gives them back at every step, and every
row stands at a position of its own. A row here has one size whatever it has read: the keys of an attention layer are
filled up with zeros on the left, which no query sees, and positions are the server's.

Bytes of a row: the weights of every memory, its momenta where the rule has them and its anchor where a chunk has more
than one token; W-1 keys and values of every window, and `room` of every full attention.

Dims: B rows of a call, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_megatron.hf.attention_atlas import AttentionState, FullAttention
from atlas_megatron.hf.baselines_atlas import DeltaNet
from atlas_megatron.hf.cache_atlas import AtlasCache, mapped, tensors_of
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.hybrid_atlas import MemoryAsGate
from atlas_megatron.hf.kernels_atlas import MemoryRule, MemoryState, gated_delta
from atlas_megatron.hf.memory_atlas import AtlasMemory
from atlas_megatron.hf.modeling_atlas import AtlasModel
from atlas_megatron.hf.registry_atlas import MIXERS


def check_servable(config: AtlasConfig) -> None:
    """Raise ValueError for a model whose rows cannot stand at positions of their own."""
    for symbol in dict.fromkeys(config.pattern):
        why = MIXERS[symbol].alike(config)
        if why:
            raise ValueError(
                f"a layer of pattern={config.pattern!r} cannot be served in batches: {why}; read and continue one text "
                "at a time with atlas-generate"
            )


@dataclass(frozen=True)
class Form:
    """What is kept of a layer's state. room: keys of an attention; rule: of its memory, if it has one."""

    room: int
    rule: MemoryRule | None

    @property
    def follows(self) -> tuple[bool, bool]:
        """Whether momentum and anchor need not be kept: there is none; a chunk of one token starts at its weights."""
        return (False, False) if self.rule is None else (not self.rule.momentum, self.rule.chunk == 1)


class Rows:
    """How the state of one text of a model lies in a row.

    room: tokens that a full attention keeps. shapes, dtypes: of the tensors of a row.
    """

    def __init__(self, model: AtlasModel, room: int) -> None:
        """Reads one token to see what the model keeps. Raises ValueError as `check_servable`."""
        check_servable(model.config)
        self.model = model
        window = model.config.section("attention").window
        full = [isinstance(layer.mixer, FullAttention) for layer in model.layers]
        self._forms = [
            Form(room if whole else window - 1, _rule_of(layer.mixer))
            for whole, layer in zip(full, model.layers, strict=True)
        ]
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.embed_tokens.weight.device)
        with torch.no_grad():
            cache = model(input_ids=token, use_cache=True).past_key_values
        self._template = self._widened(cache.states)
        leaves = [leaf for state in self._template for leaf in tensors_of(state)]
        self.shapes = [tuple(leaf.shape[1:]) for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]

    @property
    def bytes(self) -> int:
        """Of one row."""
        return sum(dtype.itemsize * torch.Size(s).numel() for s, dtype in zip(self.shapes, self.dtypes, strict=True))

    def read(
        self, tokens: Tensor, leaves: Sequence[Tensor] | None, positions: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Read tokens [B, T]: hidden states [B, T, hidden], and the leaves of the rows after.

        leaves: of the rows before, [B, ...] each; None: nothing was read. positions: tokens that each row has read.
        """
        cache = AtlasCache(self.model.config)
        if leaves is not None:
            cache.states = self._narrowed(leaves, positions)
            cache.position = self._position(positions, tokens.device)
        out = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return out.last_hidden_state, self.leaves_of(cache)

    def leaves_of(self, cache: AtlasCache) -> list[Tensor]:
        """The leaves of rows that a cache has read."""
        return [leaf for state in self._widened(cache.states) for leaf in tensors_of(state)]

    def _widened(self, states: Sequence[Any]) -> list[Any]:
        return [_widened(state, form) for state, form in zip(states, self._forms, strict=True)]

    def _narrowed(self, leaves: Sequence[Tensor], positions: Sequence[int]) -> list[Any]:
        """The layers' states of rows: attention with as many keys as the longest row has."""
        remaining, longest = iter(leaves), max(positions)
        position = self._position(positions, leaves[0].device)
        states = []
        for state, form in zip(self._template, self._forms, strict=True):
            state = mapped(state, lambda _: next(remaining))
            states.append(_narrowed(state, position, replace(form, room=min(longest, form.room))))
        return states

    @staticmethod
    def _position(positions: Sequence[int], device: torch.device) -> int | Tensor:
        """One number where all rows stand alike: layers are then spared what tells them apart."""
        alike = all(position == positions[0] for position in positions)
        return positions[0] if alike else torch.tensor(positions, dtype=torch.int64, device=device)


def _rule_of(mixer: Any) -> MemoryRule | None:
    """How a layer's memory learns; None: it has none that is known here, or several, and all of its state is kept."""
    if isinstance(mixer, DeltaNet):
        return gated_delta.RULE
    memory = mixer.memory if isinstance(mixer, MemoryAsGate) else mixer
    return memory.rule if isinstance(memory, AtlasMemory) and not memory.memory.locals else None


def _widened(state: Any, form: Form) -> Any:
    """A state whose attention has `room` keys, zeros on the left, and whose memory stands at no position."""
    if isinstance(state, AttentionState):
        short = form.room - state.keys.shape[2]
        if short < 0:
            raise ValueError(f"{state.keys.shape[2]} tokens were read, and attention holds {form.room}; give fewer")
        return AttentionState(*(F.pad(t, (0, 0, short, 0)) for t in (state.keys, state.values)))
    if isinstance(state, MemoryState):
        momentum, anchor = form.follows
        return replace(state.at(0), momentum=() if momentum else state.momentum, anchor=() if anchor else state.anchor)
    return _each(state, lambda part: _widened(part, form))


def _narrowed(state: Any, position: int | Tensor, form: Form) -> Any:
    """A state whose attention has the last `room` keys, and whose memory is whole and stands at `position`."""
    if isinstance(state, AttentionState):
        first = state.keys.shape[2] - form.room
        return AttentionState(state.keys[:, :, first:], state.values[:, :, first:])
    if isinstance(state, MemoryState):
        weights, (momentum, anchor) = state.weights, form.follows
        nothing = tuple(w.new_zeros(()).expand_as(w) for w in weights)
        return replace(
            state.at(position),
            momentum=nothing if momentum else state.momentum,
            anchor=weights if anchor else state.anchor,
        )
    return _each(state, lambda part: _narrowed(part, position, form))


def _each(state: Any, fn: Any) -> Any:
    """A tuple or dataclass of states with `fn` applied to each; else the same."""
    if isinstance(state, tuple):
        return tuple(map(fn, state))
    if is_dataclass(state) and not isinstance(state, type):
        return type(state)(**{f.name: fn(getattr(state, f.name)) for f in fields(state)})
    return state
