"""Texts into tokens by several processes, in order, in memory that grows neither with the corpus nor with a document.

Imports neither torch nor Megatron, so that the worker processes start fast.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np

from atlas_megatron.data.pieces import pieces
from atlas_megatron.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from atlas_megatron.data.corpus import Document

BATCH_CHARACTERS = 1 << 20  # that a worker encodes at a time


@dataclass(frozen=True)
class Piece:
    """A piece of a document's text; ends: whether it is the last one."""

    document: Document
    text: str
    ends: bool


def encode_documents(
    found: Iterable[Document], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Piece, np.ndarray]]:
    """The pieces of documents with their int32 token ids, in order, encoded by `workers` processes.

    The ids of a document's pieces, one after the other, are those of its whole text. At most three batches a worker
    are on their way.
    """
    for batch, encoded in _encode_batches(_batches(found, tokenizer), tokenizer, workers):
        yield from zip(batch, encoded, strict=True)


def _pieces(document: Document, tokenizer: Tokenizer) -> Iterator[Piece]:
    with document.opened() as source:
        before: str | None = None
        for text in pieces(source, tokenizer.encode):
            if before is not None:
                yield Piece(document, before, ends=False)
            before = text
    yield Piece(document, before or "", ends=True)


def _batches(found: Iterable[Document], tokenizer: Tokenizer) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for document in found:
        for piece in _pieces(document, tokenizer):
            batch.append(piece)
            characters += len(piece.text)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _encode_batches(
    batches: Iterable[list[Piece]], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
    if workers == 1:
        for batch in batches:
            yield batch, _encode(tokenizer, _texts(batch))
        return
    # Spawned, not forked: tokenizers and torch have threads by now, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.folder,)) as pool:
        under_way: deque[tuple[list[Piece], Future[list[np.ndarray]]]] = deque()
        try:
            for batch in batches:
                under_way.append((batch, pool.submit(_encode_in_worker, _texts(batch))))
                if len(under_way) == 3 * workers:
                    sent, encoded = under_way.popleft()
                    yield sent, encoded.result()
            for sent, encoded in under_way:
                yield sent, encoded.result()
        except BrokenProcessPool as error:
            raise ValueError(f"one of {workers} worker processes died; try fewer, or more memory") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _texts(batch: Sequence[Piece]) -> list[str]:
    return [piece.text for piece in batch]


_worker_tokenizer: Tokenizer  # one a worker process, read once


def _start_worker(folder: str) -> None:
    global _worker_tokenizer
    # Of a preparation that is killed nobody ends the workers, which would wait for texts for good.
    Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = load_tokenizer(folder)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: Sequence[str]) -> list[np.ndarray]:
    return _encode(_worker_tokenizer, texts)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.asarray(tokenizer.encode(text), dtype=np.int32) for text in texts]
