"""What a model has to beat on its validation sequences: a unigram model and gzip, in bits per byte."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from atlas_megatron.config import Config
from atlas_megatron.data.batches import sources, text_of, validation_labels
from atlas_megatron.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Baselines:
    """Bits per byte on the very bytes that the run's validation loss is of."""

    unigram: float  # each token by its frequency in the training set, whatever came before
    gzip: float  # gzip -9 of the text itself: adapts to it, was trained on nothing


def baselines(config: Config) -> Baselines:
    """Measure both on the run's validation sequences. Raises ValueError where the run has none."""
    labels = validation_labels(config)
    if not labels:
        raise ValueError("the run has no validation sequences; set data.validation and train.validate_sequences")
    text = text_of(labels, load_tokenizer(config.data.tokenizer))
    nats = -np.log(_unigram(config))[np.asarray(labels)].sum()
    compressed = gzip.compress(text, compresslevel=9, mtime=0)
    return Baselines(float(nats) / math.log(2) / len(text), 8 * len(compressed) / len(text))


def _unigram(config: Config) -> np.ndarray:
    """The probability of each token in the training blend; one seen once more than it was, so that none is 0."""
    drawn = sources(config, config.data.train)
    total = sum(source.weight for source in drawn)
    probabilities = np.zeros(config.model.vocab_size)
    for source in drawn:
        counts = np.ones(config.model.vocab_size)
        for document in IndexedDataset(source.prefix):
            counts += np.bincount(document, minlength=config.model.vocab_size)
        probabilities += source.weight / total * counts / counts.sum()
    return probabilities
