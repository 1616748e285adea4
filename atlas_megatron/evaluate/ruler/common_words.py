"""RULER's common words extraction: a numbered list in which ten words stand more often than all others.

After NVIDIA/RULER, scripts/data/synthetic/common_words_extraction.py; the prompt's words are those of its
constants.py. As there, a solved example stands first and the order is random over the whole list. Until 2025-05-13 no
space parted the example's answer from its question. Ours: the words are made up (words.py); the example's are not the
list's; the list is made while it is read; what its last whole round of words leaves of the length is filled with
uncommon words that stand once, the last one cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.filler import TextFolder
from atlas_megatron.evaluate.haystack import Example, Question, encode, room_for_context
from atlas_megatron.evaluate.ruler.lists import AT_ONCE, cut, tokens_of
from atlas_megatron.evaluate.ruler.shuffle import Shuffle
from atlas_megatron.evaluate.words import WORDS, word

OPENING = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
QUESTION = (
    "\nQuestion: What are the 10 most common words in the above list?"
    " Answer: The top 10 words that appear most often in the list are:"
)


@dataclass(frozen=True)
class Repeats:
    """How often each common and each uncommon word stands in a list."""

    common: int
    uncommon: int


@dataclass(frozen=True)
class Size:
    """Of a list, and of the solved example before it, which has so many different words."""

    repeats: Repeats
    example_words: int
    example_repeats: Repeats


@dataclass(frozen=True)
class CommonWords:
    """common: how many such words; `long` from `long_from` tokens on if it fits (ours: if), else `short`.

    before_answer: between the example's question and its answer.
    """

    common: int
    long: Size
    long_from: int
    short: Size
    max_new_tokens: int
    before_answer: str = " "


@dataclass(frozen=True)
class WordList:
    """A numbered list of the common words and of any number of uncommon ones: the vocabulary's from `first` on."""

    tokenizer: Tokenizer
    vocabulary: Shuffle
    first: int
    common: tuple[str, ...]
    repeats: Repeats

    @property
    def common_entries(self) -> int:
        return len(self.common) * self.repeats.common

    def sizes(self) -> Iterator[int]:
        """Tokens of the list with 0, 1, 2, ... uncommon words: the order, which comes later, does not matter."""
        count = self.common_entries
        size = sum(self._number_size(number) for number in range(1, count + 1))
        size += self.repeats.common * sum(len(tokens_of(self.tokenizer, f" {text}")) for text in self.common)
        yield size
        for uncommon, text in enumerate(self._uncommon_from(0)):
            if self.first + uncommon > WORDS - 2 * AT_ONCE:
                raise ValueError(f"a list of {size:,} tokens uses up all {WORDS:,} words there are; ask for less")
            size += self.repeats.uncommon * len(tokens_of(self.tokenizer, f" {text}"))
            size += sum(self._number_size(count + number) for number in range(1, self.repeats.uncommon + 1))
            count += self.repeats.uncommon
            yield size

    def fitting(self, room: int) -> int:
        """How many uncommon words leave the list within `room` tokens; negative if even the common ones do not."""
        return next(uncommon for uncommon, size in enumerate(self.sizes()) if size > room) - 1

    def entries(self, order: Shuffle, uncommon: int) -> Iterator[np.ndarray]:
        """The entries' tokens: all words as often as they stand, in this order, then more uncommon ones without end."""
        number = 0
        for text in self._texts(order, uncommon):
            number += 1
            yield tokens_of(self.tokenizer, _label(number))
            yield tokens_of(self.tokenizer, f" {text}")

    def _texts(self, order: Shuffle, uncommon: int) -> Iterator[str]:
        for start in range(0, order.count, AT_ONCE):
            slots = order(np.arange(start, min(start + AT_ONCE, order.count)))
            ranks = np.maximum(slots - self.common_entries, 0) // self.repeats.uncommon
            for slot, text in zip(slots, self._uncommon(ranks), strict=True):
                yield self.common[slot // self.repeats.common] if slot < self.common_entries else text
        yield from self._uncommon_from(uncommon)

    def _uncommon_from(self, rank: int) -> Iterator[str]:
        while True:
            yield from self._uncommon(np.arange(rank, rank + AT_ONCE))
            rank += AT_ONCE

    def _uncommon(self, ranks: np.ndarray) -> list[str]:
        return [word(int(number)) for number in self.vocabulary(self.first + ranks)]

    def _number_size(self, number: int) -> int:
        return len(tokens_of(self.tokenizer, _label(number)))


def _label(number: int) -> str:
    """What stands before an entry's word: no space before the first of a list."""
    return f"{'' if number == 1 else ' '}{number}."


def common_words(
    task: CommonWords, name: str, tokenizer: Tokenizer, length: int, seed: tuple[int, ...], folder: TextFolder | None
) -> Example:
    """One example; `folder` goes unused. Raises ValueError for a length without room."""
    generator = np.random.default_rng(seed)
    vocabulary = Shuffle(WORDS, generator)
    first = max(task.long.example_words, task.short.example_words)
    common = tuple(word(int(number)) for number in vocabulary(np.arange(first, first + task.common)))
    question = Question(QUESTION, common)
    sizes = [task.long, task.short] if length >= task.long_from else [task.short]
    for size in sizes:
        opening = encode(tokenizer, _solved(task, size, vocabulary, generator) + OPENING)
        words = WordList(tokenizer, vocabulary, first + task.common, common, size.repeats)
        room = length - len(tokenizer.encode(question.text))
        uncommon = words.fitting(room - len(opening))
        if uncommon >= task.common:
            break
    else:
        least = list(zip(range(task.common + 1), words.sizes(), strict=False))[-1][1]
        room_for_context(name, tokenizer, length, [question], len(opening) + least)
    order = Shuffle(words.common_entries + uncommon * size.repeats.uncommon, generator)
    pieces = partial(cut, opening, partial(words.entries, order, uncommon), room)
    return Example(name, room, pieces, (question,), task.max_new_tokens, ())


def _solved(task: CommonWords, size: Size, vocabulary: Shuffle, generator: np.random.Generator) -> str:
    """A list with its answer, of the vocabulary's first words."""
    common = task.common
    words = [word(int(number)) for number in vocabulary(np.arange(size.example_words))]
    entries = words[:common] * size.example_repeats.common + words[common:] * size.example_repeats.uncommon
    shuffled = [entries[place] for place in generator.permutation(len(entries))]
    return f"{OPENING}{_numbered(shuffled)}{QUESTION}{task.before_answer}{_numbered(words[:common])}\n"


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {text}" for number, text in enumerate(words, start=1))
