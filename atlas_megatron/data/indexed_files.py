"""Megatron's .bin and .idx files out of parts: documents as they were written, joined, copies left out where asked.

A part holds the tokens (PREFIX.bin), the length of each sequence (PREFIX.lengths, int32) and a record of each document
(PREFIX.documents, 32 bytes). All are read in blocks, so memory does not grow with the corpus. Megatron-Core's own
builder keeps its lists in memory, some 100 bytes a document. Its files and these are equal byte for byte (a test).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

from atlas_megatron.data.corpus import SplitSummary

# The .idx file: magic, version, dtype code, counts of sequences and of document borders, then int32 lengths, int64 byte
# offsets, int64 document borders.
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")
# Of a document: its sequences, the bytes of its text, and the first 128 bits of the text's SHA-256.
RECORD = np.dtype([("sequences", "<i8"), ("bytes", "<i8"), ("digest", "<u8", 2)])
DIGEST_BYTES = 16
SUFFIXES = (".bin", ".lengths", ".documents")  # of a part
DOCUMENTS_A_READ = 1 << 14
BYTES_A_COPY = 1 << 24
# Copies are looked for among so many bytes of digests at a time.
BUCKET_BYTES = 64 << 20


@dataclass(frozen=True)
class Part:
    """Documents of one split in order, as `SplitWriter` writes them."""

    prefix: Path

    def file(self, suffix: str) -> Path:
        return Path(f"{self.prefix}{suffix}")

    @property
    def documents(self) -> int:
        return self.file(".documents").stat().st_size // RECORD.itemsize


@dataclass(frozen=True)
class Block:
    """Neighbouring documents of a part, without those that are left out."""

    part: Part
    lengths: np.ndarray  # int32, of each sequence
    sequences: np.ndarray  # int64, of each document
    bytes: int  # of their texts
    runs: list[tuple[int, int]]  # where their tokens begin and end in the part's .bin, counted in tokens


def first_of_each(parts: Sequence[Part]) -> np.ndarray:
    """Booleans `[documents]`: whether a document's text is in none before it, by 128 bits of its SHA-256.

    Memory: one byte a document, and BUCKET_BYTES. The records are read once for each bucket.
    """
    total = sum(part.documents for part in parts)
    keep = np.ones(total, dtype=bool)
    buckets = -(-total * (DIGEST_BYTES + 8) // BUCKET_BYTES)
    for bucket in range(buckets):
        numbers, digests = [], []
        for first, records in _records(parts):
            # By the half of the digest that the split of a document does not hang on: it is even in both splits.
            own = np.flatnonzero(records["digest"][:, 1] % np.uint64(buckets) == bucket)
            numbers.append(first + own)
            digests.append(records["digest"][own])
        number, digest = np.concatenate(numbers), np.concatenate(digests)
        # A stable order: of equal texts the first stays first.
        order = np.lexsort((digest[:, 1], digest[:, 0]))
        again = (digest[order[1:]] == digest[order[:-1]]).all(axis=1)
        keep[number[order[1:][again]]] = False
    return keep


def join(
    parts: Sequence[Part], target: Path, dtype: type[np.number], keep: np.ndarray | None, advance: Callable[[int], None]
) -> SplitSummary:
    """Write TARGET.bin and TARGET.idx of the documents of all parts, in order; how much is in them.

    keep: booleans `[documents]` of those that are not left out; None for all. A single part of which all is kept gives
    its .bin away. advance: called with the bytes that were copied.
    """
    summary, sequences = SplitSummary(0, 0, 0), 0
    for block in _blocks(parts, keep):
        tokens = int(block.lengths.sum(dtype=np.int64))
        summary = SplitSummary(
            summary.documents + len(block.sequences), summary.tokens + tokens, summary.bytes + block.bytes
        )
        sequences += len(block.lengths)
    with Path(f"{target}.idx").open("wb") as index:
        code = DType.code_from_dtype(dtype)
        index.write(INDEX_HEADER.pack(INDEX_MAGIC, 1, code, sequences, summary.documents + 1))
        _write_lists(index, parts, keep, np.dtype(dtype).itemsize)
    if len(parts) == 1 and keep is None:
        os.rename(parts[0].file(".bin"), f"{target}.bin")
    else:
        _copy(parts, Path(f"{target}.bin"), keep, np.dtype(dtype).itemsize, advance)
    return summary


def _write_lists(index: BinaryIO, parts: Sequence[Part], keep: np.ndarray | None, itemsize: int) -> None:
    for block in _blocks(parts, keep):
        index.write(block.lengths.tobytes())
    place = 0
    for block in _blocks(parts, keep):
        ends = place + np.cumsum(block.lengths, dtype="<i8") * itemsize
        index.write((ends - block.lengths.astype("<i8") * itemsize).tobytes())
        place = int(ends[-1]) if len(ends) else place
    border = np.zeros(1, dtype="<i8")
    index.write(border.tobytes())
    for block in _blocks(parts, keep):
        borders = border[-1] + np.cumsum(block.sequences, dtype="<i8")
        index.write(borders.tobytes())
        border = borders[-1:] if len(borders) else border


def _copy(
    parts: Sequence[Part], target: Path, keep: np.ndarray | None, itemsize: int, advance: Callable[[int], None]
) -> None:
    sources = {part: part.file(".bin").open("rb") for part in parts}
    try:
        with target.open("wb") as written:
            for block in _blocks(parts, keep):
                for start, end in block.runs:
                    source, left = sources[block.part], (end - start) * itemsize
                    source.seek(start * itemsize)
                    while left:
                        raw = source.read(min(left, BYTES_A_COPY))
                        if not raw:
                            raise ValueError(f"{source.name} is truncated; prepare that part again")
                        written.write(raw)
                        left -= len(raw)
                        advance(len(raw))
    finally:
        for source in sources.values():
            source.close()


def _blocks(parts: Sequence[Part], keep: np.ndarray | None) -> Iterator[Block]:
    first = 0
    for part in parts:
        place = 0  # in its .bin
        with part.file(".documents").open("rb") as documents, part.file(".lengths").open("rb") as lists:
            while len(records := np.fromfile(documents, RECORD, DOCUMENTS_A_READ)):
                lengths = np.fromfile(lists, "<i4", int(records["sequences"].sum()))
                kept = np.ones(len(records), bool) if keep is None else keep[first : first + len(records)]
                ends = place + np.cumsum(lengths, dtype=np.int64)[np.cumsum(records["sequences"]) - 1]
                starts = np.concatenate([[place], ends[:-1]])
                yield Block(
                    part,
                    lengths[np.repeat(kept, records["sequences"])],
                    records["sequences"][kept],
                    int(records["bytes"][kept].sum()),
                    _runs(kept, starts, ends),
                )
                place, first = int(ends[-1]), first + len(records)


def _runs(kept: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> list[tuple[int, int]]:
    """Where neighbours that are kept begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    return [(int(starts[edge]), int(ends[end - 1])) for edge, end in edges.reshape(-1, 2)]


def _records(parts: Sequence[Part]) -> Iterator[tuple[int, np.ndarray]]:
    """The records of all parts in blocks, each with the number of its first."""
    first = 0
    for part in parts:
        with part.file(".documents").open("rb") as documents:
            while len(records := np.fromfile(documents, RECORD, DOCUMENTS_A_READ)):
                yield first, records
                first += len(records)
