"""Documents packed into one sequence: each begins a chunk of its own, so that a reset falls on a chunk's border.

Tokens move to slots: a document's token at position p stands in slot p mod C of its chunk, whole chunks follow each
other, and slots that no token takes neither decay nor write. What a window reaches is then in the document's own
chunks, or in the halo before the call; gates that reach further are set to zero. At most one chunk a document is
padding.

How many chunks there are, and which of them hold a border, decides what is launched: the host reads the positions,
and on a GPU it waits for them. It does so once a batch (`pack` keeps what it made), not at every layer. A CUDA graph
cannot capture the call that reads.

Dims: B batch, T tokens, H heads, N chunks of C slots, W window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .rule import Gates, MemoryState


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a call go. All on the tokens' device.

    positions [B, T]: of each token in its document, or in its shard of it; slots [B, T]; chunks: N; resets [N, B]:
    a document begins with this chunk; ends [B]: the chunk of a row's last token; offset [B]: the slot of its first.
    resetting, ending: whether any row does so in each chunk, known without asking the device again.
    """

    positions: Tensor
    slots: Tensor
    chunks: int
    resets: Tensor
    ends: Tensor
    offset: Tensor
    chunk: int
    resetting: tuple[bool, ...]
    ending: tuple[bool, ...]

    def placed(self, t: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, ...] -> [B, N C, ...]."""
        out = t.new_full((t.shape[0], self.chunks * self.chunk, *t.shape[2:]), fill)
        return _put(out, self.slots, t)

    def placed_after(self, halo: Tensor, t: Tensor) -> Tensor:
        """Sources: [B, W-1, ...] that came before and [B, T, ...] -> [B, W-1 + N C, ...], each at its slot."""
        before = halo.shape[1]
        out = t.new_zeros(t.shape[0], before + self.chunks * self.chunk, *t.shape[2:])
        out = _put(out, self.slots + before, t)
        if before:
            out = _put(out, self.offset[:, None] + torch.arange(before, device=t.device), halo)
        return out

    def taken(self, t: Tensor) -> Tensor:
        """[B, N C, ...] -> [B, T, ...]: what stands at the tokens' slots."""
        return _take(t, self.slots)

    def following(self, sources: Tensor, window: int) -> Tensor:
        """Of `placed_after`: the last W-1 tokens of each row's document, zero where it is shorter [B, W-1, ...]."""
        back = torch.arange(window - 2, -1, -1, device=sources.device)
        place = self.slots[:, -1:] + (window - 1) - back
        kept = _take(sources, place)
        inside = back <= self.positions[:, -1:]
        return kept * inside.view(*inside.shape, *[1] * (sources.dim() - 2)).to(kept.dtype)

    def gates(self, gates: Gates, before: Tensor | None, window: int) -> Gates:
        """The gates at their slots, gamma as pair gates that stay in their document.

        before [B, W-1, H]: the sources' gates of the halo, with `source` gates.
        """
        gamma = gates.gamma
        reach = torch.arange(window, device=gamma.device)
        if before is not None:
            sources = self.placed_after(before, gamma)
            back = (self.slots + window - 1).unsqueeze(-1) - reach  # [B, T, W]
            gamma = _take(sources, back.flatten(1)).unflatten(1, back.shape[1:]).mT
        inside = (reach <= self.positions.unsqueeze(-1)).unsqueeze(2)  # [B, T, 1, W]
        return Gates(
            alpha=self.placed(gates.alpha, 1.0),
            eta=self.placed(gates.eta),
            theta=self.placed(gates.theta, 1.0),
            gamma=self.placed(gamma * inside.to(gamma.dtype)),
        )


# Whole rows by one index: `gather` and `scatter` would want an index as large as the tensor.


def _rows(place: Tensor, length: int) -> Tensor:
    """place [B, T] as rows of a [B * length, ...] tensor."""
    return (place + length * torch.arange(place.shape[0], device=place.device)[:, None]).flatten()


def _take(t: Tensor, place: Tensor) -> Tensor:
    """t [B, L, ...], place [B, T] -> [B, T, ...]."""
    return t.flatten(0, 1).index_select(0, _rows(place, t.shape[1])).unflatten(0, place.shape)


def _put(out: Tensor, place: Tensor, t: Tensor) -> Tensor:
    """out [B, L, ...] with t [B, T, ...] written into it at place [B, T]."""
    out.flatten(0, 1).index_copy_(0, _rows(place, out.shape[1]), t.flatten(0, 1))
    return out


# What was made of a tensor of positions, or of parts of it, for as long as that tensor lives.
_made: WeakIdKeyDictionary = WeakIdKeyDictionary()


def pack(positions: Tensor, chunk: int, shard: int = 0) -> Packing:
    """positions [B, T]: of each token in its document, one more than the token before or 0 where one begins.

    shard: tokens of a document after which the memory begins anew, as if another one began; 0: never.

    The host reads them. Every layer of a model asks with the same tensor, or the same part of it, and gets what was
    made for the first one.
    """
    if positions.is_inference():  # these do not say whether they have been changed
        return _pack(positions, chunk, shard)
    whole = positions if positions._base is None else positions._base
    part = positions._version, positions.shape, positions.stride(), positions.storage_offset(), chunk, shard
    of_whole = _made.setdefault(whole, {})
    if part not in of_whole:
        # Of a copy: what is kept must not keep alive what it is kept for.
        of_whole[part] = _pack(positions.clone(), chunk, shard)
    return of_whole[part]


def _pack(positions: Tensor, chunk: int, shard: int) -> Packing:
    positions = positions % shard if shard else positions
    begins = positions % chunk == 0
    begins[:, 0] = True
    number = begins.cumsum(1) - 1
    chunks = int(number[:, -1].max()) + 1
    resets = (F.one_hot(number, chunks).bool() & (positions == 0).unsqueeze(-1)).any(1).T
    ends = number[:, -1]
    return Packing(
        positions=positions,
        slots=number * chunk + positions % chunk,
        chunks=chunks,
        resets=resets,
        ends=ends,
        offset=positions[:, 0] % chunk,
        chunk=chunk,
        resetting=tuple(resets.any(1).tolist()),
        ending=tuple((ends[:, None] == torch.arange(chunks, device=ends.device)).any(0).tolist()),
    )


def documents(positions: Tensor) -> Iterator[tuple[int, slice, bool]]:
    """(row, its tokens, whether the document begins here) of each stretch of one document, row by row."""
    for row, places in enumerate(positions.tolist()):
        borders = [0, *(t for t in range(1, len(places)) if places[t] == 0), len(places)]
        for start, stop in zip(borders, borders[1:], strict=False):
            yield row, slice(start, stop), places[start] == 0


def row_of(state: MemoryState, row: int, position: int) -> MemoryState[int]:
    """The state of one sequence of the batch. position: tokens read of its document."""
    return state.map(lambda t: t[row : row + 1]).at(position)


def of_rows(states: list[MemoryState[int]]) -> MemoryState[Tensor]:
    """The states of single sequences as one batch; the position becomes [B]."""
    fields: dict[str, Any] = {}
    for name in vars(states[0]):
        parts = [getattr(state, name) for state in states]
        if isinstance(parts[0], tuple):
            fields[name] = tuple(torch.cat(matrices) for matrices in zip(*parts, strict=True))
        elif isinstance(parts[0], Tensor):
            fields[name] = torch.cat(parts)
        else:
            fields[name] = None if parts[0] is None else torch.tensor(parts, device=states[0].keys.device)
    return MemoryState(**fields)
