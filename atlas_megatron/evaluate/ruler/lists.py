"""What the tasks on long lists of words share: tokens of short pieces, remembered, and a list cut at a length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.haystack import encode, packed

AT_ONCE = 4096  # places of a list that are looked up together
REMEMBERED = 1 << 17  # pieces


@lru_cache(maxsize=REMEMBERED)
def tokens_of(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """As `encode`; not to be written to."""
    return encode(tokenizer, text)


def cut(opening: np.ndarray, parts: Callable[[], Iterator[np.ndarray]], length: int) -> Iterator[np.ndarray]:
    """The opening and then the parts, which do not end, up to `length` tokens; in pieces as a context has them."""

    def until_length() -> Iterator[np.ndarray]:
        yield opening
        left = length - len(opening)
        for part in parts():
            yield part[:left]
            left -= len(part)
            if left <= 0:
                return

    return packed(until_length())
