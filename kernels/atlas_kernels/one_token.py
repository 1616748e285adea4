"""One token a row, every row at a position of its own: how a batch of texts is continued.

A packed call fills each row up to a whole chunk: for one token that is C times the work. A chunk has one token here, as
where all rows stand alike. What a position decides is done row by row: where a document, a shard or a chunk begins, and
which rows write under `ns_period`.

Cost: that of one token of `omega_memory_chunked`, and a choice between two copies of the anchor where a chunk begins or
ends. Rows that write under `ns_period` and rows that do not are two calls.

Dims: B batch, T = 1 tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .rule import Inputs, MemoryRule, MemoryState

# One token of every row, all at one position.
Step = Callable[[MemoryState[int], Inputs], "tuple[Tensor, MemoryState[int]]"]


def one_token(
    rule: MemoryRule, state: MemoryState, inputs: Inputs, start: tuple[Tensor, ...], positions: Tensor, step: Step
) -> tuple[Tensor, MemoryState[Tensor]]:
    """As `omega_memory_packed` with positions [B, 1], which the host reads. step: computes rows that stand alike."""
    # A shard of a document begins as another one would; a chunk's places are the same in both.
    places = positions[:, 0] % rule.shard if rule.shard else positions[:, 0]
    numbers = places.tolist()
    state = _entered(rule, state, start, places, numbers)
    groups: dict[int, list[int]] = {}
    for row, number in enumerate(numbers):
        groups.setdefault(_place_like(rule, number), []).append(row)
    if len(groups) == 1:
        y, after = step(state.at(next(iter(groups))), inputs)
    else:
        y, after = _by_group(groups, state, inputs, step)
    position = positions[:, 0] + 1
    anchor = state.anchor
    if any((number + 1) % rule.chunk == 0 for number in numbers):
        anchor = _where(position % rule.chunk == 0, after.weights, anchor)
    return y, replace(after.at(position), anchor=anchor)


def _place_like(rule: MemoryRule, position: int) -> int:
    """A place in a chunk at which a token writes as it does at `position`; not the first, if any other does."""
    writes = rule.writes_at(position)
    return next((place for place in range(1, rule.chunk) if rule.writes_at(place) == writes), 0)


def _entered(
    rule: MemoryRule, state: MemoryState, start: tuple[Tensor, ...], position: Tensor, numbers: list[int]
) -> MemoryState:
    """The state whose rows are at their start where a document begins, and at their anchor where a chunk does.

    position [B], and the same as numbers.
    """
    if 0 in numbers:
        begins, batch = position == 0, len(numbers)
        fresh = tuple(w.expand(batch, *w.shape) for w in start)
        emptied = state.map(lambda t: t.masked_fill(begins.view(-1, *[1] * (t.dim() - 1)), 0))
        state = replace(emptied, weights=_where(begins, fresh, state.weights), anchor=state.anchor)
    if any(number % rule.chunk == 0 for number in numbers):
        state = replace(state, anchor=_where(position % rule.chunk == 0, state.weights, state.anchor))
    return state


def _by_group(
    groups: dict[int, list[int]], state: MemoryState, inputs: Inputs, step: Step
) -> tuple[Tensor, MemoryState[int]]:
    """The rows of each group at its place; back in their order."""
    outputs, states, order = [], [], []
    for place, rows in groups.items():
        index = torch.tensor(rows, device=inputs.q.device)
        own = lambda t, index=index: t.index_select(0, index)  # noqa: E731
        y, after = step(state.map(own).at(place), inputs.map(own))
        outputs.append(y)
        states.append(after)
        order += rows
    back = torch.tensor(order, device=inputs.q.device).argsort()
    together = lambda parts: torch.cat(parts).index_select(0, back)  # noqa: E731
    fields: dict[str, Any] = {}
    for name, first in vars(states[0]).items():
        parts = [getattr(state, name) for state in states]
        if isinstance(first, tuple):
            fields[name] = tuple(together(matrices) for matrices in zip(*parts, strict=True))
        else:
            fields[name] = together(parts) if isinstance(first, Tensor) else first
    return together(outputs), MemoryState(**fields)


def _where(rows: Tensor, yes: tuple[Tensor, ...], no: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Matrices [B, H, rows, cols] of `yes` in the rows [B] that are true, of `no` in the others."""
    mask = rows.view(-1, 1, 1, 1)
    return tuple(torch.where(mask, a, b) for a, b in zip(yes, no, strict=True))
