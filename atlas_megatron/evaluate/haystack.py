"""A context of an exact number of tokens, of any length, made while it is read: needles buried in filler.

Texts are encoded one by one (the opening, each sentence with the space or newline that parts it from its neighbours,
each needle, each question) and their tokens stand one after another; nothing is encoded across such a border. So a
length is exact, whatever the tokenizer, and what was encoded once serves again. No special token stands before them
(RULER and BABILong leave that to the tokenizer), and no chat template around them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from atlas_megatron.data.tokenizer import Tokenizer

PIECE = 65_536  # tokens of a context that are in memory at once, about


@dataclass(frozen=True)
class Question:
    """text: asked after the context; it ends so that the answer follows. answers: what the task's metrics look for."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """One context with what is asked about it.

    context() starts anew at every call and yields the same int32 pieces of at most PIECE tokens, `length` in all;
    with the longest question they are as many tokens as were asked for. depths: where the needles lie on which the
    answers rest, as shares of the context (0 its start, 1 its end), each before it moves to the next border between
    sentences; none where the answers rest on all of the context. Each of several questions is asked of the same
    context, not after another's answer; then the depths are theirs in turn.
    """

    name: str
    length: int
    context: Callable[[], Iterator[np.ndarray]]
    questions: tuple[Question, ...]
    max_new_tokens: int
    depths: tuple[float, ...]


@dataclass(frozen=True)
class Stretch:
    """Whole sentences of filler: tokens [n] int32, at least one; ends [sentences], where each one ends, the last n."""

    tokens: np.ndarray
    ends: np.ndarray


# An endless stream of filler; every call starts it anew, the same.
Filler = Callable[[], Iterator[Stretch]]


@dataclass(frozen=True)
class Needle:
    """Tokens that are buried whole. depth: the share of the filler that precedes them."""

    tokens: np.ndarray
    depth: float


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The text's token ids, int32."""
    return np.asarray(tokenizer.encode(text), dtype=np.int32)


def at_start(depth: float, filler_length: int) -> bool:
    """Whether a needle of this depth stands before all filler."""
    return int(depth * filler_length) == 0


def room_for_context(name: str, tokenizer: Tokenizer, length: int, questions: Sequence[Question], needed: int) -> int:
    """The tokens that `length` leaves for the context beside its longest question.

    Raises ValueError where fewer than the `needed` ones are left.
    """
    asked = max(len(tokenizer.encode(question.text)) for question in questions)
    if length < needed + asked:
        raise ValueError(
            f"{name} in {length:,} tokens: its facts and its question alone take {needed + asked:,}; "
            "ask for at least that many"
        )
    return length - asked


@dataclass(frozen=True)
class Haystack:
    """An opening, then filler with needles at borders between sentences, in their order; `length` tokens in all.

    The filler's last sentence is cut to fit, and nothing follows a cut. Raises ValueError where `length` has no room
    for the opening and the needles.
    """

    opening: np.ndarray
    needles: tuple[Needle, ...]
    filler: Filler
    length: int

    def __post_init__(self) -> None:
        if self.filler_length < 0:
            raise ValueError(
                f"a context of {self.length:,} tokens is too short for its {self.fixed_length:,} tokens of facts; "
                "ask for a longer one"
            )
        depths = [needle.depth for needle in self.needles]
        if depths != sorted(depths) or not all(0 <= depth <= 1 for depth in depths):
            raise ValueError(f"needles lie at depths {depths}; give depths from 0 to 1 in rising order")

    @property
    def fixed_length(self) -> int:
        """Tokens that are no filler."""
        return len(self.opening) + sum(len(needle.tokens) for needle in self.needles)

    @property
    def filler_length(self) -> int:
        return self.length - self.fixed_length

    @property
    def depths(self) -> tuple[float, ...]:
        """Of all needles, as `Example.depths` has them."""
        found, before = [], len(self.opening)
        for needle in self.needles:
            found.append((before + int(needle.depth * self.filler_length)) / self.length)
            before += len(needle.tokens)
        return tuple(found)

    def pieces(self) -> Iterator[np.ndarray]:
        """The context, int32, in pieces of at most PIECE tokens."""
        return packed(self._parts())

    def _parts(self) -> Iterator[np.ndarray]:
        yield self.opening
        total, done = self.filler_length, 0
        waiting = deque((int(needle.depth * total), needle.tokens) for needle in self.needles)
        if total == 0:
            yield from (tokens for _, tokens in waiting)
            return
        for stretch in self.filler():
            left = total - done
            fitting = int(np.searchsorted(stretch.ends, left, side="right"))
            borders = np.concatenate(([0], stretch.ends[:fitting]))
            start, last = 0, left <= len(stretch.tokens)
            while waiting:
                place = int(np.searchsorted(borders, waiting[0][0] - done, side="left"))
                if place == len(borders) and not last:
                    break
                border = int(borders[min(place, len(borders) - 1)])
                yield stretch.tokens[start:border]
                yield waiting.popleft()[1]
                start = border
            yield stretch.tokens[start : min(left, len(stretch.tokens))]
            if last:
                return
            done += len(stretch.tokens)
        raise AssertionError(f"the filler ended after {done} of {total} tokens")


def packed(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same tokens regrouped, so that every array but the last holds PIECE of them."""
    piece, used = np.empty(PIECE, np.int32), 0
    for part in parts:
        start = 0
        while start < len(part):
            taken = min(PIECE - used, len(part) - start)
            piece[used : used + taken] = part[start : start + taken]
            used, start = used + taken, start + taken
            if used == PIECE:
                yield piece
                piece, used = np.empty(PIECE, np.int32), 0
    if used:
        yield piece[:used]
