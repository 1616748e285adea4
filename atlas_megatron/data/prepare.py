"""Text files into Megatron indexed datasets: one folder with both splits, the tokenizer and a summary."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from atlas_megatron.data.corpus import SPLITS, SplitSummary, Summary, documents, expand, fingerprint
from atlas_megatron.data.encoding import encode_documents
from atlas_megatron.data.indexed_files import SUFFIXES as PART_SUFFIXES
from atlas_megatron.data.indexed_files import Part, first_of_each, join
from atlas_megatron.data.pieces import pieces
from atlas_megatron.data.prefixes import SUFFIXES, indexed_prefixes
from atlas_megatron.data.reading import DocumentReader, Place
from atlas_megatron.data.records import Skipped
from atlas_megatron.data.shards import Shard
from atlas_megatron.data.split_writer import Advance, SplitWriter, check_filled
from atlas_megatron.data.tokenizer import (
    Tokenizer,
    has_tokenizer_json,
    load_tokenizer,
    train_tokenizer,
    write_converted,
)
from atlas_megatron.files.resumable import Resumable, resumable_beside
from atlas_megatron.files.scratch import built_beside, remove_left

# A tokenizer learns from this much of the training text; more changes its merges little.
TOKENIZER_BYTES = 1 << 30
TOKENIZER = "tokenizer"  # the folder, where it lies with the data
BYTES_A_SAVE = 64 << 20  # of text, between two places that a killed preparation goes on from


@dataclass(frozen=True)
class Options:
    """How text becomes tokens; either `tokenizer` or `train_vocab` is given."""

    tokenizer: str = ""  # a local Hugging Face tokenizer folder
    train_vocab: int = 0  # train a byte-level BPE of this many tokens instead
    key: str = "text"  # of JSON and Parquet
    validation: float = 0.01  # share of documents held out
    workers: int = 1  # processes that encode
    # Leave out all but the first of equal texts. Not in `repr`, for old data's sake: see `_settings`.
    dedup: bool = field(default=False, repr=False)

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
    shard: Shard | None = None,
) -> tuple[Summary, bool]:
    """Write `out`/{train,validation}.{bin,idx} and data.json; say also whether anything had to be done.

    `out` appears whole or not at all: it is built in a folder beside it and renamed. Where a killed start had saved its
    place, this one goes on from there. An earlier preparation in `out` is kept when it was made of these very inputs,
    and replaced with `overwrite` alone.
    inputs: files of text, or prefixes of indexed data, whose documents are split anew. skipped: where bad records are
    counted, which otherwise end it. shard: prepare this part alone, beside `out`, for `merge`.
    Raises ValueError for inputs or options that cannot be used.
    """
    prefixes, files = indexed_prefixes(inputs), input_files(inputs)
    own = files
    if shard:
        _check_shard(options, prefixes)
        out, own = shard.folder(out), shard.of(files)
    given, mark, earlier = look(files, out, options, overwrite, shard)
    if earlier is not None:
        return earlier, False
    if prefixes and given is None:
        raise ValueError(f"{inputs[0]} is tokens already; give their tokenizer with --tokenizer")
    if not prefixes and not shard:
        _check_splits(files, options, skipped is not None)
    with resumable_beside(out, mark) as going:
        tokenizer, kept = _tokenizer(files, options, given, going, advance, skipped is not None)
        writer = _fill(going, own, prefixes, tokenizer, options, advance, skipped)
        if shard is None:
            check_filled({name: split.documents for name, split in writer.splits.items()}, options.validation)
        with built_beside(out) as built:
            parts = {name: [part] for name, part in writer.parts.items()}
            splits, left_out = (
                finish(parts, built, writer.dtype, options.dedup, advance) if shard is None else _keep(writer, built)
            )
            if (going.work / TOKENIZER).is_dir():
                os.rename(going.work / TOKENIZER, built / TOKENIZER)
                kept = str(out / TOKENIZER)
            count = skipped.count if skipped else 0
            summary = Summary(mark, kept, tokenizer.vocab_size, splits, tokenizer.fingerprint, count, left_out)
            summary.write(built)
    return summary, True


def _fill(
    going: Resumable,
    files: Sequence[Path],
    prefixes: Sequence[str],
    tokenizer: Tokenizer,
    options: Options,
    advance: Advance,
    skipped: Skipped | None,
) -> SplitWriter:
    """Write the tokens of all documents, or of those that are left to write; the writer, closed."""
    state = going.state or {}
    writer = SplitWriter(going.work, tokenizer.vocab_size, options.validation, state.get("splits"))
    try:
        if prefixes:
            # Here, not at the top: it reads data as training does, whose imports cost seconds.
            from atlas_megatron.data.resplit import split_indexed

            split_indexed(prefixes, tokenizer, writer, advance)
        else:
            place = Place(**state["place"]) if state else None
            reader = DocumentReader(files, options.key, skipped, partial(advance, "tokens"), place)
            _encode(reader, tokenizer, writer, options.workers, going)
    finally:
        writer.close()
    return writer


def look(
    files: Sequence[Path], out: Path, options: Options, overwrite: bool, shard: Shard | None = None
) -> tuple[Tokenizer | None, str, Summary | None]:
    """The tokenizer that is given; what tells this preparation from others; and what is up to date in `out` already.

    Raises ValueError where `out` holds what must not be replaced.
    """
    remove_left(out)
    _refuse_to_lose(out, files, options)
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    mark = fingerprint(files, _settings(options, given) + (f" shard {shard.number}/{shard.count}" if shard else ""))
    earlier = Summary.read(out)
    if earlier is not None and earlier.fingerprint == mark:
        return given, mark, earlier
    if earlier is not None and not overwrite:
        raise ValueError(
            f"{out} holds data that were prepared from other inputs or with other settings; name another folder, "
            "remove this one, or replace it with --overwrite"
        )
    return given, mark, None


def finish(
    parts: Mapping[str, Sequence[Part]], built: Path, dtype: type[np.number], dedup: bool, advance: Advance
) -> tuple[dict[str, SplitSummary], int]:
    """Join the parts of each split into .bin and .idx files; how large the splits are, and how many copies are left
    out."""
    splits, left_out = {}, 0
    for name, of_split in parts.items():
        keep = first_of_each(of_split) if dedup else None
        left_out += int((~keep).sum()) if keep is not None else 0
        splits[name] = join(of_split, built / name, dtype, keep, partial(advance, "files"))
    return splits, left_out


def _keep(writer: SplitWriter, built: Path) -> tuple[dict[str, SplitSummary], int]:
    """A shard's files, as they are, for `merge`."""
    for name, part in writer.parts.items():
        for suffix in PART_SUFFIXES:
            os.rename(part.file(suffix), f"{built / name}{suffix}")
    return writer.splits, 0


def _check_shard(options: Options, prefixes: Sequence[str]) -> None:
    if prefixes:
        raise ValueError(f"{prefixes[0]} is tokens already, which one process splits; leave --shard out")
    if not options.tokenizer:
        raise ValueError(
            "shards need one tokenizer: train it first on a part of the files (--train-tokenizer, another --out), then "
            "give its folder with --tokenizer to all"
        )


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
    said = str(replace(options, tokenizer=given.fingerprint if given else "", workers=1))
    return f"{said} dedup" if options.dedup else said


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
    files: Sequence[Path], options: Options, given: Tokenizer | None, going: Resumable, advance: Advance, skip: bool
) -> tuple[Tokenizer, str]:
    """The tokenizer to use and the folder that data.json names; trained or converted, it lies with the data."""
    folder = going.work / TOKENIZER
    if given is not None and has_tokenizer_json(Path(given.folder)):
        return given, options.tokenizer
    if not going.saved:
        if given is not None:
            write_converted(given, folder)
        else:
            texts = _training_texts(files, options, advance, Skipped() if skip else None)
            train_tokenizer(texts, options.train_vocab, folder)
    return load_tokenizer(folder), ""


def _training_texts(
    files: Sequence[Path], options: Options, advance: Advance, skipped: Skipped | None
) -> Iterator[str]:
    left = TOKENIZER_BYTES
    for document in DocumentReader(files, options.key, skipped, partial(advance, "tokenizer")):
        if document.split(options.validation) == "train":
            with document.opened() as source:
                for text in pieces(source):
                    yield text
                    left -= len(text)
                    if left <= 0:
                        return


def _encode(reader: DocumentReader, tokenizer: Tokenizer, writer: SplitWriter, workers: int, going: Resumable) -> None:
    length, unsaved = 0, 0
    for piece, ids in encode_documents(reader, tokenizer, workers):
        name = writer.split(piece.document.digest)
        writer.add(name, ids)
        length += len(ids)
        if piece.ends:
            writer.add(name, np.array([tokenizer.eod], dtype=np.int32))
            writer.end(name, [length + 1], piece.document.size, piece.document.digest)
            place, length, unsaved = reader.written(), 0, unsaved + piece.document.size
            if unsaved >= BYTES_A_SAVE:
                going.save({"place": asdict(place), "splits": writer.save()})
                unsaved = 0
