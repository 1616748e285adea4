"""The splits of prepared data as they are written: a part each, and what a killed preparation can go on from."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

from atlas_megatron.data.corpus import SPLITS, SplitSummary, split_of_digest
from atlas_megatron.data.indexed_files import DIGEST_BYTES, RECORD, SUFFIXES, Part

Advance = Callable[[str, int], None]  # called with a stage, and how many bytes of the inputs it went on
LONGEST = np.iinfo(np.int32).max  # tokens of a sequence in an .idx
AS_RECORD = struct.Struct(f"<qq{DIGEST_BYTES}s")
assert AS_RECORD.size == RECORD.itemsize


@dataclass(frozen=True)
class Written:
    """How much of a split is written."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    bytes: int = 0  # of the texts


class SplitWriter:
    """Documents, each in one part or in many, so that none has to be held whole."""

    def __init__(self, folder: Path, vocab_size: int, validation: float, saved: dict[str, Any] | None = None) -> None:
        """validation: the share of documents held out; 0 for no such split. saved: what `save` gave, to go on from.

        Raises ValueError where the files hold less than was saved.
        """
        self._validation = validation
        self.dtype = DType.optimal_dtype(vocab_size)
        names = SPLITS if validation else SPLITS[:1]
        self.parts = {name: Part(folder / name) for name in names}
        self._written = {name: Written(**saved[name]) if saved else Written() for name in names}
        self._files = {
            name: [self._opened(part.file(suffix), size) for suffix, size in self._sizes(name).items()]
            for name, part in self.parts.items()
        }

    def _sizes(self, name: str) -> dict[str, int]:
        """The bytes of a split's files, by their suffixes, in the order of SUFFIXES."""
        so_far = self._written[name]
        of_tokens = so_far.tokens * np.dtype(self.dtype).itemsize
        sizes = (of_tokens, so_far.sequences * 4, so_far.documents * RECORD.itemsize)
        return dict(zip(SUFFIXES, sizes, strict=True))

    def _opened(self, file: Path, size: int) -> Any:
        """A file to write on at `size`; what came after it is cut off."""
        opened = file.open("r+b" if size else "wb")
        if opened.seek(0, os.SEEK_END) < size:
            opened.close()
            raise ValueError(f"{file} holds less than was saved; remove its folder and start again")
        opened.truncate(size)
        opened.seek(size)
        return opened

    @property
    def splits(self) -> dict[str, SplitSummary]:
        """How much of each split is written."""
        return {name: SplitSummary(one.documents, one.tokens, one.bytes) for name, one in self._written.items()}

    def split(self, digest: bytes) -> str:
        """The split of a document with this digest."""
        return split_of_digest(digest, self._validation)

    def add(self, name: str, tokens: np.ndarray) -> None:
        """Write the next tokens of a split's document."""
        self._files[name][0].write(np.ascontiguousarray(tokens, dtype=self.dtype).data)

    def end(self, name: str, lengths: Sequence[int], size: int, digest: bytes) -> None:
        """End a split's document: the lengths of its sequences, the bytes of its text in UTF-8, and their SHA-256."""
        if max(lengths) > LONGEST:
            raise ValueError(
                f"a document of {max(lengths):,} tokens is longer than a Megatron index can say ({LONGEST:,}); part it"
            )
        _, lists, documents = self._files[name]
        lists.write(np.asarray(lengths, dtype="<i4").tobytes())
        documents.write(AS_RECORD.pack(len(lengths), size, digest[:DIGEST_BYTES]))
        so_far = self._written[name]
        self._written[name] = Written(
            so_far.documents + 1, so_far.sequences + len(lengths), so_far.tokens + sum(lengths), so_far.bytes + size
        )

    def save(self) -> dict[str, Any]:
        """Bring all that was ended to the disk; what a writer of the same folder goes on from. Call it between
        documents."""
        for files in self._files.values():
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        return {name: asdict(one) for name, one in self._written.items()}

    def close(self) -> None:
        """Let go of the files; nothing is written any more."""
        for files in self._files.values():
            for file in files:
                file.close()


def check_filled(documents: dict[str, int], validation: float) -> None:
    """Raise ValueError where a split has no document."""
    for name, count in documents.items():
        if count == 0:
            raise ValueError(
                f"the {name} split is empty: {sum(documents.values())} documents, {validation} of them held out; "
                "give more documents or another share (0 holds out none)"
            )
