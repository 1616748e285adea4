"""Text files into Megatron indexed datasets: one folder with both splits, the tokenizer and a summary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from atlas_megatron.data.corpus import SPLITS, Document, Summary, documents, expand, fingerprint
from atlas_megatron.data.encoding import encode_documents
from atlas_megatron.data.pieces import pieces
from atlas_megatron.data.prefixes import SUFFIXES, indexed_prefixes
from atlas_megatron.data.records import Skipped
from atlas_megatron.data.split_writer import Advance, SplitWriter, check_filled
from atlas_megatron.data.tokenizer import (
    Tokenizer,
    has_tokenizer_json,
    load_tokenizer,
    train_tokenizer,
    write_converted,
)
from atlas_megatron.files.scratch import built_beside, remove_left

# A tokenizer learns from this much of the training text; more changes its merges little.
TOKENIZER_BYTES = 1 << 30


@dataclass(frozen=True)
class Options:
    """How text becomes tokens; either `tokenizer` or `train_vocab` is given."""

    tokenizer: str = ""  # a local Hugging Face tokenizer folder
    train_vocab: int = 0  # train a byte-level BPE of this many tokens instead
    key: str = "text"  # of JSON and Parquet
    validation: float = 0.01  # share of documents held out
    workers: int = 1  # processes that encode

    def __post_init__(self) -> None:
        if bool(self.tokenizer) == bool(self.train_vocab):
            raise ValueError("give either a tokenizer folder or the vocabulary size of one to train")
        if not 0 <= self.validation < 1:
            raise ValueError(f"a validation share of {self.validation} is out of range; give one from 0 to below 1")
        if self.workers < 1:
            raise ValueError(f"{self.workers} worker processes cannot work; give 1 or more")


def input_files(inputs: Sequence[str]) -> list[Path]:
    """The files that are read: texts by their names or globs, or the pairs of indexed data. Raises ValueError."""
    prefixes = indexed_prefixes(inputs)
    return [Path(f"{prefix}{suffix}") for prefix in prefixes for suffix in SUFFIXES] if prefixes else expand(inputs)


def prepare(
    inputs: Sequence[str],
    out: Path,
    options: Options,
    advance: Advance,
    skipped: Skipped | None = None,
    overwrite: bool = False,
) -> tuple[Summary, bool]:
    """Write `out`/{train,validation}.{bin,idx} and data.json; say also whether anything had to be done.

    `out` appears whole or not at all: it is built in a folder beside it and renamed. An earlier preparation there is
    kept when it was made of these very inputs, and replaced with `overwrite` alone. inputs: files of text, or prefixes
    of indexed data, whose documents are split anew. skipped: where bad records are counted, which otherwise end it.
    Raises ValueError for inputs or options that cannot be used.
    """
    prefixes, files = indexed_prefixes(inputs), input_files(inputs)
    remove_left(out)
    _refuse_to_lose(out, files, options)
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    mark = fingerprint(files, _settings(options, given))
    earlier = Summary.read(out)
    if earlier is not None and earlier.fingerprint == mark:
        return earlier, False
    if earlier is not None and not overwrite:
        raise ValueError(
            f"{out} holds data that were prepared from other inputs or with other settings; name another folder, "
            "remove this one, or replace it with --overwrite"
        )
    if prefixes and given is None:
        raise ValueError(f"{inputs[0]} is tokens already; give their tokenizer with --tokenizer")
    if not prefixes:
        _check_splits(files, options, skipped is not None)
    with built_beside(out) as built:
        tokenizer, kept = _tokenizer(files, options, given, built, advance, skipped is not None)
        writer = SplitWriter(built, tokenizer.vocab_size, options.validation)
        if prefixes:
            # Here, not at the top: it reads data as training does, whose imports cost seconds.
            from atlas_megatron.data.resplit import split_indexed

            split_indexed(prefixes, tokenizer, writer, advance)
        else:
            _encode(_all_documents(files, options.key, "tokens", advance, skipped), tokenizer, writer, options.workers)
        splits = writer.finish()
        kept = str(out / "tokenizer") if (built / "tokenizer").is_dir() else kept
        count = skipped.count if skipped else 0
        summary = Summary(mark, kept, tokenizer.vocab_size, splits, tokenizer.fingerprint, count)
        summary.write(built)
    return summary, True


def is_own(out: Path, vocab_size: int) -> bool:
    """Whether a script may make its own data anew, as with another Python's sources: these were prepared with its
    vocabulary. What was prepared with another one is somebody else's. Raises ValueError for a broken summary."""
    earlier = Summary.read(out)
    return earlier is not None and earlier.vocab_size == vocab_size


def _refuse_to_lose(out: Path, files: Sequence[Path], options: Options) -> None:
    """Raise ValueError if replacing `out` would remove what is not an earlier preparation."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder to write to")
    if out.is_dir() and any(out.iterdir()) and Summary.read(out) is None:
        raise ValueError(f"{out} exists and was not made by this tool; name another folder or remove it")
    sources = [*files, Path(options.tokenizer)] if options.tokenizer else files
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{source} lies in {out}, which would be replaced; name another folder to write to")


def _settings(options: Options, given: Tokenizer | None) -> str:
    """All that decides what the data are, beside their inputs; in this form ever since, so that old data stay good."""
    return str(replace(options, tokenizer=given.fingerprint if given else "", workers=1))


def _check_splits(files: Sequence[Path], options: Options, skip: bool) -> None:
    """Raise ValueError where a split will be empty, before the work: read on until each has a document."""
    counts = dict.fromkeys(SPLITS if options.validation else SPLITS[:1], 0)
    for file in files:
        for document in documents(file, options.key, Skipped() if skip else None):
            counts[document.split(options.validation)] += 1
            if all(counts.values()):
                return
    check_filled(counts, options.validation)


def _tokenizer(
    files: Sequence[Path], options: Options, given: Tokenizer | None, built: Path, advance: Advance, skip: bool
) -> tuple[Tokenizer, str]:
    """The tokenizer to use and the folder that data.json names; trained or converted, it lies with the data."""
    folder = built / "tokenizer"
    if given is None:
        texts = _training_texts(files, options, advance, Skipped() if skip else None)
        train_tokenizer(texts, options.train_vocab, folder)
    elif has_tokenizer_json(Path(given.folder)):
        return given, options.tokenizer
    else:
        write_converted(given, folder)
    return load_tokenizer(folder), ""


def _all_documents(
    files: Iterable[Path], key: str, stage: str, advance: Advance, skipped: Skipped | None
) -> Iterator[Document]:
    for file in files:
        for document in documents(file, key, skipped):
            yield document
            advance(stage, document.file_bytes)


def _training_texts(
    files: Sequence[Path], options: Options, advance: Advance, skipped: Skipped | None
) -> Iterator[str]:
    left = TOKENIZER_BYTES
    for document in _all_documents(files, options.key, "tokenizer", advance, skipped):
        if document.split(options.validation) == "train":
            with document.opened() as source:
                for text in pieces(source):
                    yield text
                    left -= len(text)
                    if left <= 0:
                        return


def _encode(found: Iterable[Document], tokenizer: Tokenizer, writer: SplitWriter, workers: int) -> None:
    length = 0
    for piece, ids in encode_documents(found, tokenizer, workers):
        name = writer.split(piece.document.digest)
        writer.add(name, ids)
        length += len(ids)
        if piece.ends:
            writer.add(name, np.array([tokenizer.eod], dtype=np.int32))
            writer.end(name, [length + 1], piece.document.size)
            length = 0
