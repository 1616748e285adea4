"""Indexed data by name: the prefix of a .bin/.idx pair, alone or with its weight in a blend."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from atlas_megatron.config.batch_ramp import UNITS

SUFFIXES = (".bin", ".idx")
COUNT = re.compile(r"(\d+(?:\.\d+)?)([KMBT])")  # of tokens: 500M, 1.5B


def is_indexed(prefix: str) -> bool:
    """Whether one of a prefix's two files lies there."""
    return any(Path(f"{prefix}{suffix}").is_file() for suffix in SUFFIXES)


def prefix_of(word: str) -> str:
    """The prefix that a word names, which may be one of the two files."""
    for suffix in SUFFIXES:
        if word.endswith(suffix) and not is_indexed(word):
            return word.removesuffix(suffix)
    return word


def indexed_prefixes(inputs: Sequence[str]) -> list[str]:
    """The prefixes that the words of a command name, all of them; an empty list where none is of indexed data.

    Raises ValueError where some words are and some are not.
    """
    prefixes = [prefix_of(word) for word in inputs]
    # A text whose name is that of a pair, without its suffix, is that text.
    indexed = [
        is_indexed(prefix) and (prefix != word or not Path(word).is_file())
        for prefix, word in zip(prefixes, inputs, strict=True)
    ]
    if any(indexed) and not all(indexed):
        text, tokens = inputs[indexed.index(False)], inputs[indexed.index(True)]
        raise ValueError(f"{text} is text and {tokens} is indexed data; prepare them apart")
    return list(dict.fromkeys(prefixes)) if any(indexed) else []


def blend(words: Sequence[str]) -> list[tuple[float | None, str]]:
    """Split each ``"weight prefix"``, ``"20B prefix"`` (a count of tokens) or ``"prefix"`` of a blend.

    A count is a weight too, as sets are drawn in proportion. What lies there by its whole name is a prefix, though it
    begins with a number: "2024 crawl/train". Raises ValueError for weights that cannot be, and where the words are not
    of one kind.
    """
    asked_tokens(words)
    pairs = [(None if amount is None else float(amount), prefix) for amount, prefix in map(_parted, words)]
    for weight, prefix in pairs:
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"the weight of {prefix} is {weight}; give a number greater than 0")
    if len({weight is None for weight, _ in pairs}) > 1:
        raise ValueError(f"some sets of the blend {list(words)} carry a weight and some none; write one for each")
    return pairs


def asked_tokens(words: Sequence[str]) -> list[int]:
    """The counts of tokens in a blend that has counts for weights; an empty list where it has none.

    Raises ValueError where some sets have a count and some a weight.
    """
    amounts = [amount for amount, _ in map(_parted, words)]
    counts = [amount for amount in amounts if isinstance(amount, int)]
    if counts and any(isinstance(amount, float) for amount in amounts):
        raise ValueError(
            f"some sets of the blend {list(words)} carry a count of tokens and some a weight; write one kind for all"
        )
    return counts


def _parted(word: str) -> tuple[float | int | None, str]:
    """A word's weight (a float), its count of tokens (an int) or neither, and its prefix."""
    whole = word.strip()
    first, *rest = whole.split(maxsplit=1) or [""]
    if rest and not is_indexed(prefix_of(whole)):
        count = COUNT.fullmatch(first)
        if count:
            return round(float(count[1]) * UNITS[count[2]]), prefix_of(rest[0])
        try:
            return float(first), prefix_of(rest[0])
        except ValueError:
            pass  # a folder whose name holds a blank
    return None, prefix_of(whole)
