"""Where the tokens of a call stand in their texts: counted in 64 bits, padding and packed documents kept apart.

Dims: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What other models take the borders of packed documents from.
PACKING = ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# Tokens read before a call: of every row alike, or [B] int64 of each.
Position = int | Tensor


@dataclass(frozen=True)
class TokenPositions:
    """The positions of a call's tokens, and what the next call's begin with.

    documents [B, T] int64: of each token in its own document, 0 where one begins, which the layers do not look out of;
    None: every row goes on, alike, at `first`. after: tokens of the text read after the call.
    """

    first: int
    tokens: int
    documents: Tensor | None
    after: Position

    def positions(self, device: torch.device) -> Tensor:
        """[B or 1, T] int64."""
        if self.documents is not None:
            return self.documents
        return torch.arange(self.first, self.first + self.tokens, device=device)[None]


@dataclass(frozen=True)
class Padding:
    """What an attention mask leaves out: before [B] columns on the left of each text, which has count [B] tokens.

    left: whether any text begins late; right: whether any ends early; begun: whether every row has text. While a graph
    is exported none is known, and all are taken for true.
    """

    before: Tensor
    count: Tensor
    tokens: int
    left: bool
    right: bool
    begun: bool

    def to_the_left(self, x: Tensor) -> Tensor:
        """x [B, T, ...] with every text moved to the first column; its padding then follows it."""
        return self._moved(x, self.before)

    def back(self, x: Tensor) -> Tensor:
        """The inverse of `to_the_left`."""
        return self._moved(x, -self.before)

    def _moved(self, x: Tensor, by: Tensor) -> Tensor:
        column = (torch.arange(self.tokens, device=by.device) + by[:, None]) % self.tokens
        return x.gather(1, column.view(*column.shape, *[1] * (x.dim() - 2)).expand_as(x))


@dataclass(frozen=True)
class Unpacked:
    """Packed documents as rows of their own, for layers that want all rows to stand alike: N rows of L columns.

    places [B T]: of each token among the N L of the rows; what no token takes follows a document. shape: (B, T).
    """

    places: Tensor
    rows: int
    length: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, documents: Tensor) -> Unpacked:
        """documents: those of a `TokenPositions`."""
        begins = documents == 0
        begins[:, 0] = True
        number, length = begins.flatten().cumsum(0) - 1, int(documents.max()) + 1
        return cls(number * length + documents.flatten(), int(number[-1]) + 1, length, tuple(documents.shape))

    def apart(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [N, L, ...]."""
        empty = x.new_zeros(self.rows * self.length, *x.shape[2:])
        return empty.index_copy(0, self.places, x.flatten(0, 1)).unflatten(0, (self.rows, self.length))

    def back(self, x: Tensor) -> Tensor:
        """The inverse of `apart`."""
        return x.flatten(0, 1).index_select(0, self.places).unflatten(0, self.shape)


def exporting() -> bool:
    """Whether a graph is exported, which can ask nothing of a tensor. torch.compile can, and claims to export too."""
    if torch.compiler.is_dynamo_compiling():
        return bool(getattr(torch.compiler, "_is_exporting_flag", False))
    return torch.compiler.is_exporting()


def of_any_length(x: Tensor) -> bool:
    """Whether x [..., T, width] stands for any number of tokens, in a graph that is exported so."""
    return isinstance(x.shape[-2], torch.SymInt) and exporting()


def check_packing(position_ids: Tensor | None, given: Mapping[str, Any]) -> None:
    """Raise ValueError where packed documents are said in another way than by position_ids, which would go unheard."""
    said = [name for name in PACKING if given.get(name) is not None]
    if said and position_ids is None:
        raise ValueError(
            f"{said[0]} was given without position_ids, by which this model tells packed documents apart; give them "
            "too: they count up by one, and begin at 0 where a document does"
        )


def padding_of(mask: Tensor | None, read: Position, batch: int, tokens: int) -> Padding | None:
    """What the mask leaves out of `tokens` columns that follow `read` tokens; None: nothing.

    mask [B, T or more]: 0 for padding, its last T columns the new tokens'. Raises ValueError for another shape, and for
    padding inside a text.
    """
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; expected [B, T] = {(batch, tokens)}, or more columns, "
            "whose last are the new tokens'"
        )
    real = mask[:, mask.shape[1] - tokens :].bool()
    graph = exporting()
    if not graph and bool(real.all()):
        return None
    column = torch.arange(tokens, device=real.device)
    count = real.sum(1)
    # Of a row of padding alone all of it stands before the text.
    pads = torch.where(count > 0, real.int().argmax(1), tokens)
    whole = (real == ((column >= pads[:, None]) & (column < (pads + count)[:, None]))).all()
    late = pads > 0
    begun = torch.as_tensor(read, device=real.device).expand(batch) > 0
    wrong = (
        "attention_mask leaves out tokens inside a text; pad on the left (tokenizer.padding_side='left'), or on the "
        "right where no cache is asked for"
    )
    if graph:
        torch._assert_async(whole & ~(begun & late).any(), wrong)
        return Padding(pads, count, tokens, True, True, True)
    if not bool(whole) or bool((begun & late).any()):
        raise ValueError(wrong)
    right = bool((pads + count < tokens).any())
    return Padding(pads, count, tokens, bool(late.any()), right, bool((count > 0).all()))


def place_of(
    read: Position,
    columns: int,
    batch: int,
    tokens: int,
    position_ids: Tensor | None,
    padding: Padding | None,
    aligned: bool,
) -> TokenPositions:
    """Where `tokens` tokens of each row stand that follow `read` tokens of text in so many columns of the batch.

    position_ids [B or 1, T]: count up by one, and begin at 0 where a packed document does; None: all of a row is one
    text. Raises ValueError for others. padding: on the left it is a document before the text, of its own; aligned: it
    is none, for texts were moved to the left.
    """
    documents = None
    if position_ids is not None:
        documents = _packed(position_ids, read, columns, batch, tokens, padding)
    left = padding is not None and padding.left and not aligned
    if documents is None and not left and isinstance(read, int):
        return TokenPositions(read, tokens, None, read + tokens)
    given = next(t for t in (documents, read, padding and padding.before) if isinstance(t, Tensor))
    column = torch.arange(tokens, device=given.device)
    before = torch.as_tensor(read, device=given.device).expand(batch)
    if documents is None:
        documents = before[:, None] + column
    if padding is None or not left:
        return TokenPositions(0, tokens, documents, documents[:, -1] + 1)
    last = (padding.count - 1).clamp(min=0)[:, None]
    after = torch.where(padding.count > 0, documents.gather(1, last)[:, 0] + 1, before)
    documents = torch.where(column < padding.before[:, None], column, padding.back(documents))
    return TokenPositions(0, tokens, documents, after)


def _packed(
    position_ids: Tensor, read: Position, columns: int, batch: int, tokens: int, padding: Padding | None
) -> Tensor | None:
    """The position of every token in its document [B, T], texts moved to the left; None: all of a row goes on."""
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != tokens:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; expected [B, T] = {(batch, tokens)}, or (1, {tokens})"
        )
    given = position_ids.long().expand(batch, tokens)
    column = torch.arange(tokens, device=given.device)
    inside = torch.ones_like(given, dtype=torch.bool)
    if padding is not None:
        given, inside = padding.to_the_left(given), column < padding.count[:, None]
    follows = F.pad(given[:, 1:] == given[:, :-1] + 1, (1, 0), value=True)
    begins = F.pad(given[:, 1:] == 0, (1, 0), value=False)
    if exporting():
        torch._assert_async(
            (follows | ~inside).all(), "position_ids begin anew inside a row; an exported graph reads one text a row"
        )
        return None
    wrong = inside & ~follows & ~begins
    if bool(wrong.any()):
        row, place = (int(n) for n in wrong.nonzero()[0])
        raise ValueError(
            f"position_ids goes from {int(given[row, place - 1])} to {int(given[row, place])} in row {row}; positions "
            "count up by one, and begin at 0 where a packed document does: leave position_ids out to read whole rows"
        )
    before = torch.as_tensor(read, device=given.device).expand(batch)
    # With a cache a row has to go on where the cache stands; or as generic code counts, by the columns it was given.
    begun = (before > 0) & inside[:, 0]
    if bool((begun & (given[:, 0] != before) & (given[:, 0] != columns)).any()):
        raise ValueError(
            f"position_ids begins at {given[:, 0].tolist()}, and the cache has read {before.tolist()} tokens; leave "
            "position_ids out, or leave past_key_values out to begin anew"
        )
    packed = begins & inside & ~follows
    if not bool(packed.any()):
        return None
    # Distances alone count: what begins at another position than 0 does so with its row.
    first = packed.cumsum(1) == 0
    own = torch.where(first, before[:, None] + column, given)
    # Padding behind a text is another document.
    return torch.where(inside, own, column - padding.count[:, None] if padding is not None else own)
