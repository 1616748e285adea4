"""A memory over a sequence in shards: heads exchanged inside a group of ranks, the state handed on between groups.

`heads`: an all-to-all gives each rank all tokens of a share of the heads. `handoff`: each rank scans its own tokens and
passes the memory on to the right; cut into slices of batch and heads, so that one rank works on a slice while its right
neighbour works on the one before. `heads+handoff`: the first between near ranks, the second between far ones; the other
two are its ends.

Dims: B batch, t tokens of a shard, H heads of this tensor-parallel rank, N ranks that exchange heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from atlas_megatron.parallel.context import ALONE, Chain, all_tokens, to_heads, to_sequence


class Scannable(Protocol):
    """What reads and writes token by token, each head for itself."""

    def advance(self, tokens: tuple[Tensor, ...], heads: slice, state: Any, positions: Tensor | None) -> Any:
        """tokens [B, t, h, ...] of these heads -> (y [B, t, h, V], the state after). state None: there were none."""
        ...

    def empty_state(self, tokens: tuple[Tensor, ...], heads: slice, position: int | Tensor) -> Any:
        """A state of the right shapes at this position."""
        ...

    def to_message(self, state: Any) -> tuple[Tensor, ...]:
        """What the right neighbour has to be told of a state."""
        ...

    def from_message(self, empty: Any, message: tuple[Tensor, ...]) -> Any:
        """The state that `to_message` tells of."""
        ...


@dataclass(frozen=True)
class Shards:
    """Where this rank stands in the sequence. Without groups: it has all of it."""

    tokens: Chain = ALONE  # every rank, its own tokens each
    heads: torch.distributed.ProcessGroup | None = None  # ranks that exchange heads
    chain: Chain = ALONE  # ranks that hand the memory on
    slices: int = 1  # of batch x heads, at most

    @staticmethod
    def of(groups: ProcessGroupCollection, slices: int) -> Shards:
        """From core's context-parallel group and its two levels."""
        if groups.cp is None or groups.cp.size() == 1:
            return Shards()
        near, far = groups.hcp
        return Shards(Chain(groups.cp), near, Chain(far), slices or 2 * far.size())

    def scan(
        self, memory: Scannable, tokens: tuple[Tensor, ...], state: Any, positions: Tensor | None, *, sliced: bool
    ) -> tuple[Tensor, Any]:
        """The memory's y [B, t, H, V] of this rank's tokens [B, t, H, ...], and the state after its stretch.

        state: before the whole sequence, of this rank's share of the heads; the same on every rank of the chain.
        positions [B, t]: of packed documents. sliced: nobody asks for the state after, which is then None.
        """
        if self.tokens.size == 1:
            return memory.advance(tokens, slice(None), state, positions)
        tokens = self._exchanged(tokens)
        positions = None if positions is None else all_tokens(positions, self.heads)
        batch, _, heads = tokens[0].shape[:3]
        first = self.heads.rank() * heads if self.heads is not None else 0
        rows, columns = slicing(batch, heads, self.slices if sliced and state is None else 1)
        outputs, after = [], None
        for row in range(0, batch, rows):
            across = []
            for column in range(0, heads, columns):
                part = tuple(t[row : row + rows, :, column : column + columns] for t in tokens)
                own = None if positions is None else positions[row : row + rows]
                y, after = self._hand_on(memory, part, slice(first + column, first + column + columns), state, own)
                across.append(y)
            outputs.append(torch.cat(across, 2))
        return to_sequence(torch.cat(outputs), self.heads), None if sliced else after

    def _hand_on(
        self, memory: Scannable, tokens: tuple[Tensor, ...], heads: slice, state: Any, positions: Tensor | None
    ) -> tuple[Tensor, Any]:
        """One slice: from the left, over this rank's tokens, to the right."""
        chain = self.chain
        if chain.rank > 0:
            # A document that goes on over the border is at its token's position, one that begins there at 0.
            position = chain.rank * tokens[0].shape[1] + (0 if state is None else state.position)
            empty = memory.empty_state(tokens, heads, position if positions is None else positions[:, 0])
            state = memory.from_message(empty, chain.receive(memory.to_message(empty), tokens[0], state))
        y, after = memory.advance(tokens, heads, state, positions)
        if chain.rank < chain.size - 1:
            y = chain.pass_on(y, memory.to_message(after))
        return y, after

    def _exchanged(self, tokens: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """[B, t, H, ...] each -> [B, N t, H/N, ...], in one message."""
        if self.heads is None or self.heads.size() == 1:
            return tokens
        flat = [t.flatten(3) if t.dim() > 3 else t.unsqueeze(3) for t in tokens]
        together = to_heads(torch.cat(flat, 3), self.heads).split([t.shape[3] for t in flat], 3)
        return tuple(part.reshape(*part.shape[:3], *t.shape[3:]) for part, t in zip(together, tokens, strict=True))


def slicing(batch: int, heads: int, slices: int) -> tuple[int, int]:
    """(sequences, heads) of a slice, of at most `slices` equal ones: heads are cut first, then the batch."""
    columns = max(d for d in range(1, min(heads, slices) + 1) if heads % d == 0)
    rows = max(d for d in range(1, min(batch, max(1, slices // columns)) + 1) if batch % d == 0)
    return batch // rows, heads // columns
