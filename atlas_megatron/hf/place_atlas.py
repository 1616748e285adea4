"""Where the tokens of a call stand in their sequences: counted in 64 bits, padding on the left as another document.

Dims: B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Tokens read before a call: of every row alike, or [B] int64 of each.
Position = int | Tensor


@dataclass(frozen=True)
class Place:
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


def place_of(position: Position, mask: Tensor | None, batch: int, tokens: int) -> tuple[Place, bool]:
    """Where `tokens` tokens stand that follow `position`; and whether the mask leaves out some at a row's end.

    mask [B, T or more]: 0 for padding, its last T columns the new tokens'. Padding on the left is a document before the
    text, of its own. Raises ValueError for padding inside a text.
    """
    if mask is not None:
        if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; expected [B, T] = {(batch, tokens)}, or more columns, "
                "whose last are the new tokens'"
            )
        real = mask[:, mask.shape[1] - tokens :].bool()
        if not bool(real.all()):
            return _padded(position, real)
    if isinstance(position, Tensor):
        documents = position[:, None] + torch.arange(tokens, device=position.device)
        return Place(0, tokens, documents, position + tokens), False
    return Place(position, tokens, None, position + tokens), False


def _padded(position: Position, real: Tensor) -> tuple[Place, bool]:
    batch, tokens = real.shape
    column = torch.arange(tokens, device=real.device)
    count = real.sum(1)
    # Of a row of padding alone all of it stands before the text.
    pads = torch.where(count > 0, real.int().argmax(1), tokens)
    inside = (column >= pads[:, None]) & (column < (pads + count)[:, None])
    before = torch.as_tensor(position, device=real.device).expand(batch)
    if not torch.equal(inside, real) or bool(((before > 0) & (pads > 0)).any()):
        raise ValueError(
            "attention_mask leaves out tokens inside a text; pad on the left (tokenizer.padding_side='left'), or on "
            "the right where no cache is asked for"
        )
    cut_short = bool((pads + count < tokens).any())
    if not bool((pads > 0).any()) and isinstance(position, int):
        return Place(position, tokens, None, position + tokens), cut_short
    documents = torch.where(column < pads[:, None], column, before[:, None] + column - pads[:, None])
    return Place(0, tokens, documents, before + tokens - pads), cut_short
