"""Text files into Megatron indexed datasets: one folder with both splits, the tokenizer and a summary."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from atlas_megatron.corpus import (
    SPLITS,
    Document,
    SplitSummary,
    Summary,
    documents,
    expand,
    fingerprint,
    split_of,
)
from atlas_megatron.tokenizer import Tokenizer, encode_batches, load_tokenizer, train_tokenizer

# A tokenizer learns from this much of the training text; more changes its merges little.
TOKENIZER_BYTES = 1 << 30
BATCH_CHARACTERS = 1 << 20  # that a worker encodes at a time

Advance = Callable[[str, int], None]  # called with a stage, and how many bytes of the inputs it went on


@dataclass(frozen=True)
class Options:
    """How text becomes tokens; either `tokenizer` or `train_vocab` is given."""

    tokenizer: str = ""  # a local Hugging Face tokenizer folder
    train_vocab: int = 0  # train a byte-level BPE of this many tokens instead
    key: str = "text"  # of JSON lines and Parquet rows
    validation: float = 0.01  # share of documents held out
    workers: int = 1  # processes that encode

    def __post_init__(self) -> None:
        if bool(self.tokenizer) == bool(self.train_vocab):
            raise ValueError("give either a tokenizer folder or the vocabulary size of one to train")
        if not 0 <= self.validation < 1:
            raise ValueError(f"a validation share of {self.validation} is out of range; give one from 0 to below 1")
        if self.workers < 1:
            raise ValueError(f"{self.workers} worker processes cannot work; give 1 or more")


def prepare(inputs: Sequence[str], out: Path, options: Options, advance: Advance) -> tuple[Summary, bool]:
    """Write `out`/{train,validation}.{bin,idx} and data.json; say also whether anything had to be done.

    `out` appears whole or not at all: it is built in a folder beside it and renamed. An earlier
    preparation there is replaced only then; when it was made of these very inputs it is kept.
    Raises ValueError for inputs or options that cannot be used.
    """
    files = expand(inputs)
    _refuse_to_lose(out, files, options)
    mark = fingerprint(files + _tokenizer_files(options), str(replace(options, workers=1)))
    earlier = Summary.read(out)
    if earlier is not None and earlier.fingerprint == mark:
        return earlier, False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        built = Path(scratch) / "new"
        built.mkdir()
        folder = options.tokenizer
        if options.train_vocab:
            train_tokenizer(_training_texts(files, options, advance), options.train_vocab, built / "tokenizer")
            folder = str(built / "tokenizer")
        tokenizer = load_tokenizer(folder)
        splits = _write_splits(files, built, tokenizer, options, advance)
        kept = str(out / "tokenizer") if options.train_vocab else folder
        summary = Summary(mark, kept, tokenizer.vocab_size, splits, tokenizer.fingerprint)
        summary.write(built)
        if out.exists():
            os.rename(out, Path(scratch) / "old")
        os.rename(built, out)
    return summary, True


def _refuse_to_lose(out: Path, files: Sequence[Path], options: Options) -> None:
    """Raise ValueError if replacing `out` would remove what is not an earlier preparation."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder to write to")
    if out.is_dir() and any(out.iterdir()) and Summary.read(out) is None:
        raise ValueError(f"{out} exists and was not made by this tool; name another folder or remove it")
    sources = [*files, Path(options.tokenizer).resolve()] if options.tokenizer else files
    for source in sources:
        if source.is_relative_to(out.resolve()):
            raise ValueError(f"{source} lies in {out}, which would be replaced; name another folder to write to")


def _tokenizer_files(options: Options) -> list[Path]:
    folder = Path(options.tokenizer)
    return sorted(file.resolve() for file in folder.glob("*token*")) if options.tokenizer else []


def _all_documents(files: Iterable[Path], key: str, stage: str, advance: Advance) -> Iterator[Document]:
    for file in files:
        for document in documents(file, key):
            yield document
            advance(stage, document.file_bytes)


def _training_texts(files: Sequence[Path], options: Options, advance: Advance) -> Iterator[str]:
    left = TOKENIZER_BYTES
    for document in _all_documents(files, options.key, "tokenizer", advance):
        if split_of(document.text, options.validation) == "train":
            yield document.text
            left -= document.file_bytes
            if left <= 0:
                return


def _batches(found: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in found:
        batch.append(document.text)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_splits(
    files: Sequence[Path], folder: Path, tokenizer: Tokenizer, options: Options, advance: Advance
) -> dict[str, SplitSummary]:
    names = SPLITS if options.validation else SPLITS[:1]
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builders = {name: IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype) for name in names}
    splits = dict.fromkeys(names, SplitSummary(0, 0, 0))
    found = _all_documents(files, options.key, "tokens", advance)
    for texts, encoded in encode_batches(_batches(found), tokenizer.folder, options.workers):
        for text, ids in zip(texts, encoded, strict=True):
            name = split_of(text, options.validation)
            builders[name].add_document(np.append(ids, tokenizer.eod), [len(ids) + 1])
            so_far = splits[name]
            splits[name] = SplitSummary(
                so_far.documents + 1, so_far.tokens + len(ids) + 1, so_far.bytes + len(text.encode())
            )
    total = sum(split.documents for split in splits.values())
    for name, split in splits.items():
        if split.documents == 0:
            raise ValueError(
                f"the {name} split is empty: {total} documents, {options.validation} of them held out; "
                "give more documents or another share (0 holds out none)"
            )
        builders[name].finalize(str(folder / f"{name}.idx"))
    return splits
