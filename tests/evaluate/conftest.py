"""A folder of text with sentences that can be told apart, and a byte-level BPE trained on it."""

from pathlib import Path

import numpy as np
import pytest

from atlas_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from atlas_megatron.evaluate.filler import TextFolder
from atlas_megatron.evaluate.words import WORDS, word

VOCABULARY = 600


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of 3,000 sentences in all; no sentence occurs twice."""
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(7)
    known = [word(int(number)) for number in generator.integers(WORDS, size=200)]
    for file in ("first.txt", "second.md"):
        lines = [
            f"{file[:5].title()} line {line} says that {' '.join(generator.choice(known, generator.integers(3, 12)))}."
            for line in range(1500)
        ]
        (folder / file).write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    needle = " One of the special magic numbers for is: 0123456789. The grass is green."
    train_tokenizer([(texts / "first.txt").read_text() + needle], VOCABULARY, folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def folder(texts: Path, tokenizer: Tokenizer) -> TextFolder:
    return TextFolder(texts, tokenizer)
