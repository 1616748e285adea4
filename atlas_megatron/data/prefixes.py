"""Indexed data by name: the prefix of a .bin/.idx pair, alone or with its weight in a blend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".bin", ".idx")


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
    """Split each ``"weight prefix"`` or ``"prefix"`` of a blend; either all carry a weight or none does.

    What lies there by its whole name is a prefix, though it begins with a number: "2024 crawl/train". Raises
    ValueError for weights that cannot be, and where some words have one and some have none.
    """
    pairs: list[tuple[float | None, str]] = []
    for word in words:
        whole = word.strip()
        first, *rest = whole.split(maxsplit=1) or [""]
        weight = None
        if rest and not is_indexed(prefix_of(whole)):
            try:
                weight, whole = float(first), rest[0]
            except ValueError:
                pass  # a folder whose name holds a blank
        pairs.append((weight, prefix_of(whole)))
    for weight, prefix in pairs:
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"the weight of {prefix} is {weight}; give a number greater than 0")
    if len({weight is None for weight, _ in pairs}) > 1:
        raise ValueError(f"some sets of the blend {list(words)} carry a weight and some none; write one for each")
    return pairs
