"""The splits of prepared data as they are written: Megatron's .bin and .idx files, and how much is in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from atlas_megatron.data.corpus import SPLITS, SplitSummary, split_of_digest

Advance = Callable[[str, int], None]  # called with a stage, and how many bytes of the inputs it went on
LONGEST = np.iinfo(np.int32).max  # tokens of a sequence in an .idx


class SplitWriter:
    """Documents, each in one part or in many, so that none has to be held whole."""

    def __init__(self, folder: Path, vocab_size: int, validation: float) -> None:
        """validation: the share of documents held out; 0 for no such split."""
        self._folder, self._validation = folder, validation
        names = SPLITS if validation else SPLITS[:1]
        dtype = DType.optimal_dtype(vocab_size)
        self._builders = {name: IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype) for name in names}
        self.splits = dict.fromkeys(names, SplitSummary(0, 0, 0))

    def split(self, digest: bytes) -> str:
        """The split of a document with this digest."""
        return split_of_digest(digest, self._validation)

    def add(self, name: str, tokens: np.ndarray) -> None:
        """Write the next tokens of a split's document."""
        builder = self._builders[name]
        builder.data_file.write(np.ascontiguousarray(tokens, dtype=builder.dtype).data)

    def end(self, name: str, lengths: Sequence[int], size: int) -> None:
        """End a split's document: the lengths of its sequences, and the bytes of its text in UTF-8."""
        if max(lengths) > LONGEST:
            raise ValueError(
                f"a document of {max(lengths):,} tokens is longer than a Megatron index can say ({LONGEST:,}); part it"
            )
        builder, so_far = self._builders[name], self.splits[name]
        builder.sequence_lengths.extend(lengths)
        builder.end_document()
        self.splits[name] = SplitSummary(so_far.documents + 1, so_far.tokens + sum(lengths), so_far.bytes + size)

    def finish(self) -> dict[str, SplitSummary]:
        """Write the indices. Raises ValueError where a split is empty."""
        check_filled({name: split.documents for name, split in self.splits.items()}, self._validation)
        for name, builder in self._builders.items():
            builder.finalize(str(self._folder / f"{name}.idx"))
        return self.splits


def check_filled(documents: dict[str, int], validation: float) -> None:
    """Raise ValueError where a split has no document."""
    for name, count in documents.items():
        if count == 0:
            raise ValueError(
                f"the {name} split is empty: {sum(documents.values())} documents, {validation} of them held out; "
                "give more documents or another share (0 holds out none)"
            )
