"""What a memory is worth at another chunk: held-out loss against the chunk that one checkpoint is read with.

A deep memory takes its gradients at weights that are up to a chunk old, and has learned to live with weights of that
age. TNT's Figure 2 (arXiv 2511.07343) shows such a memory to work only near the chunk that it was trained with. All
chunks read the same sequences, each as long as the model's training had them. Of a layer with local memories it is
their chunk that changes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from atlas_kernels.local_memories import locals_of
from atlas_megatron.config import Config, at_chunk, uses
from atlas_megatron.config.chunks import chunk_of
from atlas_megatron.data.batches import text_of, validation_sequences
from atlas_megatron.evaluate.perplexity import Text, losses_of
from atlas_megatron.evaluate.reading import SEGMENT, PeakMemory, watched
from atlas_megatron.inference.reader import Reader
from atlas_megatron.reports.results import Cell

LARGEST = 512  # of the chunks that are read where none are named


@dataclass(frozen=True)
class Sequences:
    """What every chunk reads. name: where they are from; tokens [n, T + 1], each sequence with its last label."""

    name: str
    tokens: np.ndarray

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.tokens, np.int64).tobytes()).hexdigest()


def chosen(config: Config, asked: Sequence[int]) -> tuple[int, ...]:
    """The chunks to read with: those that are asked for, else powers of two as far as LARGEST, and the trained one.

    Raises ValueError for a model without a memory, a chunk longer than its sequences, and as `at_chunk`.
    """
    if not uses(config.model.pattern, "memory"):
        raise ValueError(f"chunks: model.pattern={config.model.pattern!r} has no memory, which alone has a chunk")
    length, trained = config.model.seq_length, chunk_of(config.memory)
    shards = [local.shard for local in locals_of(config.memory)] or [config.memory.shard or length]
    for chunk in asked:
        if chunk > length:
            raise ValueError(
                f"--chunks {chunk} is longer than the model's sequences of {length} tokens (model.seq_length); give "
                "chunks up to that"
            )
    powers = [2**n for n in range(LARGEST.bit_length()) if 2**n <= min(LARGEST, length, *shards)]
    found = tuple(sorted(set(asked or [*powers, trained])))
    for chunk in found:
        at_chunk(config.memory, chunk)
    return found


def of_validation(config: Config, folder: str, most: int | None) -> Sequences:
    """The sequences that every validation of the run reads, the first `most` of them; their index goes to `folder`."""
    config = replace(config, run=replace(config.run, directory=folder))
    rows = np.array(validation_sequences(config)[:most], np.int64)
    return Sequences(", ".join(config.data.validation), rows)


def of_text(text: Text, length: int, count: int) -> Sequences:
    """So many sequences of `length` tokens, spread over a text. Raises ValueError where it is shorter than one."""
    last = len(text.tokens) - length - 1
    if last < 0:
        raise ValueError(
            f"{text.name} holds {len(text.tokens):,} tokens, fewer than one sequence of {length:,} and its last label; "
            "give a longer text"
        )
    starts = np.linspace(0, last, count).astype(np.int64).tolist()
    return Sequences(text.name, np.stack([text.tokens[start : start + length + 1] for start in starts]))


def measured(reader: Reader, rows: np.ndarray, segment: int = SEGMENT) -> Cell:
    """The loss of sequences [B, T + 1] that are read side by side with the reader's chunk.

    mean_loss: of each sequence, nats per token; tokens, bytes: of all of them.
    """
    chunk, length = chunk_of(reader.config.memory), rows.shape[1] - 1
    reader.forget()
    started, found = time.perf_counter(), []
    for piece in watched(f"chunk {chunk}", _pieces(rows, segment), length, len(rows), PeakMemory(reader.device)):
        found.append(losses_of(reader, torch.from_numpy(piece)))
    own = torch.cat(found, 1).double().mean(1)
    seconds = time.perf_counter() - started
    return {
        "chunk": chunk,
        "mean_loss": [round(loss, 6) for loss in own.tolist()],
        "tokens": length * len(rows),
        "bytes": len(text_of(rows[:, 1:].tolist(), reader.tokenizer)),
        "tokens_per_second": round(length * len(rows) / max(seconds, 1e-9), 1),
    }


def _pieces(rows: np.ndarray, segment: int) -> Iterator[np.ndarray]:
    """[B, n + 1]: n tokens to read and the labels of each, a segment at a time."""
    for start in range(0, rows.shape[1] - 1, segment):
        yield rows[:, start : start + segment + 1].astype(np.int64)
