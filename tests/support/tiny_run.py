"""A run small enough to train in a test: random text with structure, a byte tokenizer, a few layers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from atlas_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from atlas_megatron.training.metrics import read
from tests.support import processes

ROOT = Path(__file__).parents[2]
VOCABULARY = 272
LENGTH = 24  # of a document, its end included: shorter than a sequence

CONFIG = """
[run]
directory = "{root}/run"

[model]
pattern = "{pattern}"
hidden_size = 32
ffn_hidden_size = 48
vocab_size = 272
seq_length = 32

[memory]
heads = 2
head_dim = 8
expansion = 2
window = 4
chunk = 8
ns_period = 8
gate_rank = 4

[attention]
heads = 2
head_dim = 8
window = 8

[train]
steps = 6
global_batch = 4
micro_batch = 2
warmup_steps = 2
lr = 3e-3
validate_every = 3
validate_sequences = 16
stats_every = 2

[checkpoint]
every = 3
keep = 10

[data]
train = ["{root}/train"]
validation = ["{root}/validation"]
tokenizer = "{root}/tokenizer"

[log]
tensorboard = false
"""


def write(root: Path, pattern: str = "M-*-") -> Path:
    """Tokenizer, train and validation sets, and a config under `root`; the config's path."""
    text = "the memory learns at test time what the window of the text says " * 40
    train_tokenizer([text], VOCABULARY, root / "tokenizer")
    end = load_tokenizer(root / "tokenizer").eod
    generator = numpy.random.default_rng(0)
    for name, documents in (("train", 48), ("validation", 16)):
        builder = IndexedDatasetBuilder(str(root / f"{name}.bin"), dtype=DType.optimal_dtype(VOCABULARY))
        for _ in range(documents):
            # Of few tokens, every document repeats a phrase of its own: there is something to learn, also at test time.
            phrase = generator.permutation([token for token in range(64) if token != end])[:12]
            document = numpy.append(numpy.tile(phrase, 4)[: LENGTH - 1], end)
            builder.add_document(torch.from_numpy(document), [LENGTH])
        builder.finalize(str(root / f"{name}.idx"))
    path = root / "tiny.toml"
    path.write_text(CONFIG.format(root=root, pattern=pattern))
    return path


def train(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Train it as a user does, from the command line."""
    paths = os.pathsep.join((str(ROOT / "kernels"), str(ROOT)))
    return subprocess.run(
        [sys.executable, "-m", "atlas_megatron.train", str(config), *overrides],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def train_in(size: int, config: Path, runs: list[list[str]]) -> None:
    """Train with each list of overrides in `size` processes, one run after the other."""
    # Processes of its own for each: gloo's threads stay where a world is left.
    for overrides in runs:
        processes.run(size, _process, [str(config), *overrides])


def _process(rank: int, words: list[str]) -> None:
    from atlas_megatron.train import main

    assert main(words) == 0


@contextmanager
def a_world_that_is_left() -> Iterator[None]:
    """After it, the world that reading a run's model joined in this process is gone."""
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def losses(run: Path) -> list[float]:
    """The training loss of every step that a run's metrics hold."""
    return [record["loss"] for record in read(run)]
