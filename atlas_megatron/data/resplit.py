"""Indexed data split anew: the documents of .bin/.idx pairs, as they are, into a training and a validation part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from atlas_megatron.data.batches import inspect
from atlas_megatron.data.corpus import Summary
from atlas_megatron.data.split_writer import Advance, SplitWriter
from atlas_megatron.data.tokenizer import Tokenizer

TOKENS_A_READ = 1 << 20


def split_indexed(prefixes: Sequence[str], tokenizer: Tokenizer, writer: SplitWriter, advance: Advance) -> None:
    """Write every document to the split that a hash of its tokens says, so that copies fall on one side.

    Raises ValueError for broken data, and for data of another tokenizer.
    """
    for prefix in prefixes:
        _check(prefix, tokenizer)
    for prefix in prefixes:
        data = IndexedDataset(prefix)
        stream = np.memmap(f"{prefix}.bin", dtype=data.index.dtype, mode="r")
        ends = np.concatenate([[0], np.cumsum(data.sequence_lengths, dtype=np.int64)])
        for first, last in zip(data.document_indices[:-1], data.document_indices[1:], strict=True):
            tokens = stream[ends[first] : ends[last]]
            if len(tokens):
                _copy(tokens, data.sequence_lengths[first:last].tolist(), tokenizer, writer)
                advance("tokens", tokens.nbytes)


def _check(prefix: str, tokenizer: Tokenizer) -> None:
    summary = Summary.read(Path(prefix).parent)
    if summary is not None and Path(prefix).name not in summary.splits:
        summary = None  # of other data
    theirs, ours = summary.tokenizer_fingerprint if summary else "", tokenizer.fingerprint
    if summary and (theirs != ours if theirs else summary.vocab_size != tokenizer.vocab_size):
        raise ValueError(
            f"{prefix} was made with another tokenizer ({summary.tokenizer}, {summary.vocab_size} tokens) than "
            f"{tokenizer.folder} ({tokenizer.vocab_size} tokens); give that one with --tokenizer"
        )
    inspect(prefix, tokenizer.vocab_size)


def _copy(tokens: np.ndarray, lengths: list[int], tokenizer: Tokenizer, writer: SplitWriter) -> None:
    digest, size = hashlib.sha256(), 0
    for start in range(0, len(tokens), TOKENS_A_READ):
        part = np.asarray(tokens[start : start + TOKENS_A_READ], dtype="<i4")
        digest.update(part.tobytes())
        text = tokenizer.decode(part[part != tokenizer.eod].tolist())
        size += len(text.encode(errors="replace"))
    found = digest.digest()
    name = writer.split(found)
    for start in range(0, len(tokens), TOKENS_A_READ):
        writer.add(name, tokens[start : start + TOKENS_A_READ])
    writer.end(name, lengths, size, found)
