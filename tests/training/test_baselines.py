"""Baselines: the figures that a model is printed beside, on the bytes that its own figure is of."""

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from atlas_megatron.config import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from atlas_megatron.data.batches import text_of, validation_labels
from atlas_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from atlas_megatron.reports.baselines import baselines

VOCAB = 257  # bytes and the end of text: one token a byte


def write_set(prefix: Path, tokens: np.ndarray) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    train_tokenizer(["a"], VOCAB, tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    a, b = (tokenizer.encode(letter)[0] for letter in "ab")
    write_set(tmp_path / "train", np.asarray([a] * 3000 + [b] * 1000))
    write_set(tmp_path / "validation", np.asarray([a, b] * 100))
    return Config(
        run=RunConfig(directory=str(tmp_path / "run")),
        model=ModelConfig(vocab_size=VOCAB, seq_length=32),
        train=TrainConfig(validate_sequences=4),
        data=DataConfig(
            train=(f"{tmp_path}/train",), validation=(f"{tmp_path}/validation",), tokenizer=f"{tmp_path}/tokenizer"
        ),
    )


def test_unigram_is_the_cross_entropy_of_training_frequencies(config: Config) -> None:
    seen = 4000 + VOCAB
    expected = -(math.log2(3001 / seen) + math.log2(1001 / seen)) / 2  # half a, half b, one byte each
    assert baselines(config).unigram == pytest.approx(expected, abs=1e-12)


def test_gzip_is_of_the_validated_bytes(config: Config) -> None:
    text = text_of(validation_labels(config), load_tokenizer(config.data.tokenizer))
    assert len(text) == 4 * 32 and set(text) == set(b"ab")
    assert baselines(config).gzip == 8 * len(gzip.compress(text, 9, mtime=0)) / len(text)
