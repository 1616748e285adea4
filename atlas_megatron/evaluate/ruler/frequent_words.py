"""RULER's frequent words extraction: a text of random words whose frequencies fall off; the top three are asked for.

After NVIDIA/RULER, scripts/data/synthetic/freq_words_extraction.py; the prompt's words are those of its constants.py.
As there, the most frequent word of all is dots, which do not count. Ours: the text is made while it is read, in a
random order over its whole length; what its words leave of the length is filled with dots, the last cut.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.filler import TextFolder
from atlas_megatron.evaluate.haystack import Example, Question, encode, room_for_context
from atlas_megatron.evaluate.ruler.lists import AT_ONCE, cut, tokens_of
from atlas_megatron.evaluate.ruler.shuffle import Shuffle

OPENING = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words."
)
QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'."
    " What are the three most frequently appeared words in the above coded text?"
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
DOTS = "..."
ASKED = 3  # words


@dataclass(frozen=True)
class FrequentWords:
    """The k-th word's share is k^-alpha / zeta(alpha); of `letters` random letters; length / tokens_a_word of them."""

    alpha: float
    letters: int
    tokens_a_word: int
    max_new_tokens: int


def frequent_words(
    task: FrequentWords, name: str, tokenizer: Tokenizer, length: int, seed: tuple[int, ...], folder: TextFolder | None
) -> Example:
    """One example; `folder` goes unused. Raises ValueError for a length without room."""
    generator = np.random.default_rng(seed)
    shares = _shares(task, length)
    vocabulary = [DOTS, *_coded(len(shares) - 1, task.letters, generator)]
    sizes = np.array([len(tokens_of(tokenizer, f" {text}")) for text in vocabulary])
    opening = encode(tokenizer, OPENING)
    question = Question(QUESTION, tuple(vocabulary[1 : 1 + ASKED]))

    def counts(words: int) -> np.ndarray:
        return (words * shares).astype(np.int64)

    def size(words: int) -> int:
        return len(opening) + int(counts(words) @ sizes)

    def clear(words: int) -> bool:
        """Whether those asked for are more frequent than all others."""
        return bool(counts(words)[ASKED] > counts(words)[ASKED + 1])

    least = next(words for words in count(1) if clear(words))
    room = room_for_context(name, tokenizer, length, [question], size(least))
    words = _last(lambda words: size(words) <= room, least, length)
    words = next(fewer for fewer in range(words, 0, -1) if clear(fewer))
    order = Shuffle(int(counts(words).sum()), generator)
    parts = partial(_text, tokenizer, vocabulary, np.cumsum(counts(words)), order)
    return Example(name, room, partial(cut, opening, parts, room), (question,), task.max_new_tokens, ())


def _shares(task: FrequentWords, length: int) -> np.ndarray:
    """Of the words by rank; those left out that would not stand once in `length` words."""
    most = max(ASKED + 2, length // task.tokens_a_word)
    once = int((length / zeta(task.alpha)) ** (1 / task.alpha))
    return np.arange(1.0, max(ASKED + 2, min(most, once)) + 1) ** -task.alpha / zeta(task.alpha)


def _coded(words: int, letters: int, generator: np.random.Generator) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < words:
        drawn = generator.choice(list(string.ascii_lowercase), (words - len(found), letters))
        found |= dict.fromkeys("".join(row) for row in drawn)
    return list(found)


def _text(tokenizer: Tokenizer, vocabulary: list[str], ends: np.ndarray, order: Shuffle) -> Iterator[np.ndarray]:
    """The words' tokens in this order, then dots without end. ends: where each word's slots end among all."""
    encoded = [tokens_of(tokenizer, f" {text}") for text in vocabulary]
    for start in range(0, order.count, AT_ONCE):
        slots = order(np.arange(start, min(start + AT_ONCE, order.count)))
        ranks = np.searchsorted(ends, slots, side="right")
        yield np.concatenate([encoded[rank] for rank in ranks])
    while True:
        yield encoded[0]


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The last number from low to high of which it holds; it holds of low, and no more once it fails."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def zeta(alpha: float) -> float:
    """The sum of k^-alpha over k = 1, 2, ..., for alpha > 1; the tail after 1000 terms by Euler and Maclaurin."""
    terms = 1000
    tail = terms ** (1 - alpha) / (alpha - 1) - terms**-alpha / 2 + alpha * terms ** (-alpha - 1) / 12
    return float((np.arange(1.0, terms + 1) ** -alpha).sum() + tail)
