"""Local memories beside a layer's own: small chunks, and a start anew every shard (TNT, arXiv 2511.07343 Eqs 6, 7).

    y_t = M_t(q_t) + sum_i W^i_t(q'_t)          q' = q, or Pi_t q_t brought to length 1 (projection.py)

All write the layer's keys and values; each has start weights and gates of its own. Those of equal chunk and shard are
heads of one call, whose batch holds all their shards.

Dims: B batch, T tokens, H heads, N local memories, n of them in a group, K = V head size, G gates of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import at_least_float32
from .layer_start import eta_start, gate_count, gate_starts, gates_of, initial_weights, own_residual
from .op import omega_memory, read_memory
from .projection import project
from .rule import Gates, MemoryRule, MemoryState, initial_state

# phi of a layer's queries or keys [B, T, H, K]; key: which of them.
Lift = Callable[..., Tensor]


class Local:
    """The section of one local memory: the layer's, but for its chunk, its shard, its period of writes and its step.

    trained: the chunk whose step it takes, where it was trained at another than its own.
    """

    read = "token"
    locals: tuple[str, ...] = ()
    projection = False

    def __init__(self, section: Any, chunk: int, shard: int, trained: int = 0) -> None:
        self.section, self.chunk, self.shard, self.trained = section, chunk, shard, trained or chunk
        # A memory that writes once a chunk does so at every length of it.
        self.ns_period = min(section.ns_period, chunk)
        # Derived, whatever the layer's own memory has. An orthogonal write's step follows from the period.
        other = self.trained != chunk and section.ns_steps == 0
        self.eta_start = eta_start(Local(section, self.trained, shard)) if other else 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.section, name)


def locals_of(section: Any) -> tuple[Local, ...]:
    """The sections of a layer's local memories, from "chunk/shard" or "chunk/shard/trained chunk" each.

    Raises ValueError for other words.
    """
    found = []
    for number, word in enumerate(section.locals):
        numbers = word.split("/")
        if len(numbers) not in (2, 3) or not all(n.isdecimal() and int(n) > 0 for n in numbers):
            raise ValueError(
                f'memory.locals[{number}]={word!r} is no local memory; write "chunk/shard" in tokens, for example '
                '"16/2048"'
            )
        found.append(Local(section, *map(int, numbers)))
    return tuple(found)


def groups_of(section: Any) -> dict[tuple[int, int], list[int]]:
    """The numbers of the local memories of each (chunk, shard), which are heads of one call."""
    found: dict[tuple[int, int], list[int]] = {}
    for number, local in enumerate(locals_of(section)):
        found.setdefault((local.chunk, local.shard), []).append(number)
    return found


def rules_of(section: Any) -> tuple[MemoryRule, ...]:
    """The rule of each group of `groups_of`, in its order."""
    return tuple(MemoryRule.of(Local(section, chunk, shard)) for chunk, shard in groups_of(section))


def local_gate_starts(section: Any) -> Tensor:
    """Start logits of the gates of each local memory of a head, float32 [N, G]."""
    return torch.tensor([gate_starts(local, local.shard) for local in locals_of(section)])


def local_weights(section: Any) -> tuple[Tensor, ...]:
    """The drawn starts of the local memories, [H, N, rows, cols] float32 for each matrix of one."""
    return tuple(torch.stack(drawn, 1) for drawn in zip(*map(initial_weights, locals_of(section)), strict=True))


@dataclass(frozen=True)
class LocalParameters:
    """bias [H, N, G] of the gates; view [H, N, 2K] of a write gate, or None; starts [H, N, rows, cols] a matrix."""

    bias: Tensor
    view: Tensor | None
    starts: tuple[Tensor, ...]


def gates_of_all(
    section: Any,
    logits: Tensor,
    bias: Tensor,
    k: Tensor,
    v: Tensor,
    view: Tensor | None,
    own: LocalParameters,
    budget: float = 0.0,
) -> tuple[Gates, tuple[Gates, ...]]:
    """The gates of the layer's memory, and those of each local one; arguments and gates as in `gates_of`.

    logits [B, T, H (1 + N) G]: of a head first the layer's memory, then its local ones.
    """
    sections = locals_of(section)
    count = gate_count(section)
    first, *rest = logits.unflatten(-1, (bias.shape[0], 1 + len(sections), count)).unbind(-2)
    theirs = []
    for i, (local, said) in enumerate(zip(sections, rest, strict=True)):
        seen = None if own.view is None else own.view[:, i]
        theirs.append(gates_of(local, said.flatten(-2), own.bias[:, i], k, v, seen, budget))
    return gates_of(section, first.flatten(-2), bias, k, v, view, budget), tuple(theirs)


@dataclass(frozen=True)
class LocalState:
    """What local memories carry over a cut: of each group its memories, of n H heads, and its Pi [B, H, K, K].

    spans: without projection empty.
    """

    memories: tuple[MemoryState, ...]
    spans: tuple[Tensor, ...]

    def map(self, fn: Callable[[Tensor], Tensor]) -> LocalState:
        """The state with `fn` applied to every tensor but the position."""
        return LocalState(tuple(m.map(fn) for m in self.memories), tuple(map(fn, self.spans)))


@dataclass(frozen=True)
class LocalMemories:
    """How a layer's local memories are read and written.

    section: as `MemorySection`, with `locals` and `projection`; rules: its `rules_of`, made once, for a traced graph
    cannot make them; lift: the layer's phi; products: see `omega_memory`.
    """

    section: Any
    rules: tuple[MemoryRule, ...]
    parameters: LocalParameters
    lift: Lift
    products: torch.dtype

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Sequence[Gates],
        state: LocalState | None = None,
        positions: Tensor | None = None,
        position: int = 0,
    ) -> tuple[Tensor, LocalState]:
        """The sum of what they answer [B, T, H, V] in q's dtype, and the state after the last token.

        q, k of length 1, v [B, T, H, K]; gates of each memory; positions [B, T]: of packed documents. position: of the
        first token where there is no state; it begins a shard of every memory.
        """
        memories, spans, total = [], [], None
        for number, (rule, own) in enumerate(zip(self.rules, groups_of(self.section).values(), strict=True)):
            held = None if state is None else state.memories[number]
            asked = q
            if self.section.projection:
                begins = self._begins(q, rule.shard, position if held is None else held.position, positions)
                asked, span = self._projected(q, k, begins, None if state is None else state.spans[number])
                spans.append(span)
            start = self._empty(rule, own, k, v, position) if held is None and position else held
            joined = Gates(*(self._heads([getattr(gates[i], name) for i in own]) for name in vars(gates[own[0]])))
            keys = self._copies(k, len(own))
            queries = self._copies(asked, len(own))
            y, after = omega_memory(
                self._copies(self.lift(asked), len(own)),
                self._copies(self.lift(k, key=True), len(own)),
                self._copies(v, len(own)),
                joined,
                self._starts(own),
                rule,
                state=start,
                residual=(queries, keys) if own_residual(self.section) else None,
                impl=self.section.impl,
                positions=positions,
                products=self.products,
            )
            y = y.unflatten(2, (len(own), -1)).sum(2)
            total = y if total is None else total + y
            assert isinstance(after, MemoryState)
            memories.append(after)
        assert total is not None
        return total, LocalState(tuple(memories), tuple(spans))

    def at_start(self, q: Tensor) -> Tensor:
        """What they answer to q [B, T, H, K] where nothing was written, the queries as they are: [B, T, H, V]."""
        own = list(range(len(locals_of(self.section))))
        queries = self._copies(q, len(own))
        residual = queries if own_residual(self.section) else None
        y = read_memory(self._copies(self.lift(q), len(own)), self._starts(own), self.rules[0], None, residual)
        return y.unflatten(2, (len(own), -1)).sum(2)

    def _projected(self, q: Tensor, k: Tensor, begins: Tensor, span: Tensor | None) -> tuple[Tensor, Tensor]:
        """The queries in the span of the keys, of length 1 as phi expects them; and the Pi after them."""
        moved, span = project(at_least_float32(q), at_least_float32(k), begins, span)
        return F.normalize(moved, dim=-1).to(q.dtype), span

    @staticmethod
    def _begins(q: Tensor, shard: int, position: int | Tensor, positions: Tensor | None) -> Tensor:
        """Whether each token [B, T] is the first of a shard."""
        if positions is None:
            reach = torch.arange(q.shape[1], device=q.device)
            positions = reach + (position[:, None] if isinstance(position, Tensor) else position)
        return (positions % shard == 0).expand(q.shape[0], -1)

    def _empty(self, rule: MemoryRule, own: list[int], k: Tensor, v: Tensor, position: int) -> MemoryState:
        keys, values = self._copies(self.lift(k[:, :1], key=True), len(own)), self._copies(v[:, :1], len(own))
        kept = {"residuals": own_residual(self.section), "source_gates": self.section.omega_gates != "pair"}
        return initial_state(rule, self._starts(own), keys, values, **kept).at(position)

    def _starts(self, own: list[int]) -> tuple[Tensor, ...]:
        """[n H, rows, cols] a matrix."""
        picked = (start[:, own].transpose(0, 1).flatten(0, 1) for start in self.parameters.starts)
        return tuple(map(at_least_float32, picked))

    @staticmethod
    def _copies(t: Tensor, count: int) -> Tensor:
        """[B, T, H, ...] -> [B, T, n H, ...]: the same heads for each memory."""
        return t if count == 1 else t.unsqueeze(2).expand(-1, -1, count, *t.shape[2:]).flatten(2, 3)

    @staticmethod
    def _heads(parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
