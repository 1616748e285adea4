"""Long texts through a tokenizer piece by piece: on their way in, and out again as their tokens come.

Imports neither torch nor Megatron, so that preparation's worker processes start fast.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from atlas_megatron.data.tokenizer import Tokenizer

BLOCK = 1 << 16  # characters of a file at a time
LONGEST_UNCUT = 4 * BLOCK
# Where a tokenizer cuts a text anyway, the likeliest place first. A byte-level one always does at the first: before a
# space between two words. The others are for texts without spaces: between lines, and at marks of punctuation.
PLACES = (
    re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])"),
    re.compile(r"(?<=\n)(?=[^\W\d_])"),
    re.compile(r"(?<=\w)(?=[^\w\s])|(?<=[^\w\s])(?=\w)"),
)
TRIED = 16  # of each kind, the last ones of a block
AROUND = 48  # characters on both sides of a place on which it is tried
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4  # bytes in UTF-8, and so tokens at the most


def pieces(source: TextIO, encode: Callable[[str], list[int]] | None = None) -> Iterator[str]:
    """The text in pieces whose tokens, one piece after the other, are those of the whole.

    encode: the tokenizer's, on which each cut is tried before it is made; where it writes a space at the start of every
    text, the piece leaves its own out. Without it cuts are where a byte-level tokenizer makes them. A stretch that
    offers no place to cut is cut after LONGEST_UNCUT characters, which may change the tokens at that one place.
    """
    rest = ""
    while block := source.read(BLOCK):
        rest += block
        if len(block) < BLOCK:
            break  # the end: a short text stays whole
        place, begin = _place(rest, encode)
        if place:
            yield rest[:place]
            rest = rest[begin:]
    if rest:
        yield rest


def _place(text: str, encode: Callable[[str], list[int]] | None) -> tuple[int, int]:
    """Where a piece of the text ends, and where the next begins; zeros where there is no place yet."""
    for kind in PLACES if encode else PLACES[:1]:
        found = [match.start() for match in kind.finditer(text, max(1, len(text) - BLOCK))]
        for place in reversed(found[-TRIED:]):
            begin = place if encode is None else _begin(text, place, encode)
            if begin:
                return place, begin
    return (len(text), len(text)) if len(text) > LONGEST_UNCUT else (0, 0)


def _begin(text: str, place: int, encode: Callable[[str], list[int]]) -> int:
    """Where the next piece begins for the tokens to stay as they are; zero where a cut at `place` changes them."""
    left = text[max(0, place - AROUND) : place]
    right = text[place : place + AROUND]
    whole, first = encode(left + right), encode(left)
    for begin in (place, place + 1) if right[:1] == " " else (place,):
        if whole == first + encode(text[begin : place + AROUND]):
            return begin
    return 0


class Spoken:
    """Tokens to text as they come: what is given out never ends inside a character.

    A tokenizer shows the bytes of an unfinished character as one replacement character or as several, and one with
    byte fallback makes such of the finished characters before it too. So what ends in one waits, and text is decoded
    together with the tokens since the last place where every character was whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode: Callable[[Sequence[int]], str] = tokenizer.decode
        # Given out whole: some tokenizers drop the space before a first word, so there has to be one before.
        self._before: list[int] = []
        self._pending: list[int] = []
        self._given = ""  # of the text of the pending tokens
        self._waiting = 0  # tokens since the last that finished a character

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._pending.append(token)
        self._waiting += 1
        said = ""
        while self._pending:
            text = self._text(self._pending)
            whole = text.rstrip(REPLACEMENT)
            if whole == text:
                return said + self._finish(text)
            if len(whole) > len(self._given) and whole.startswith(self._given):
                said, self._given, self._waiting = said + whole[len(self._given) :], whole, 1
                break
            if self._waiting < LONGEST_CHARACTER:
                break
            # No character is that long: its first token is of none.
            said += self._text(self._pending[:1])[len(self._given) :]
            self._pending, self._given, self._waiting = self._pending[1:], "", self._waiting - 1
        return said

    def rest(self) -> str:
        """What is left where no token follows: an unfinished character, as the tokenizer shows it."""
        return self._finish(self._text(self._pending)) if self._pending else ""

    def _text(self, tokens: list[int]) -> str:
        before, text = self._decode(self._before), self._decode(self._before + tokens)
        return text[len(before) :] if text.startswith(before) else self._decode(tokens)

    def _finish(self, text: str) -> str:
        new = text[len(self._given) :]
        if text:
            self._before = self._pending if REPLACEMENT not in text else self._pending[-1:]
        self._pending, self._given, self._waiting = [], "", 0
        return new
