"""Text corpora: documents read from files, split by content, and the summary kept beside a prepared one.

Imports neither torch nor Megatron, so that preparation's worker processes start fast.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TextIO, get_type_hints

from atlas_megatron.data.records import Skipped, go_past, holds_records, records, text_at
from atlas_megatron.data.text_files import is_utf8, measured, opened_text

SUMMARY = "data.json"
SPLITS = ("train", "validation")
HELD = 1 << 20  # bytes; a plain text above this is read from its file whenever it is needed
LARGEST_SOURCE = 200_000  # bytes; one library file larger than this would be most of a held-out split


@dataclass(frozen=True)
class Document:
    """One text, which may be too long to be held: `opened` reads it from its beginning."""

    opened: Callable[[], AbstractContextManager[TextIO]]
    digest: bytes  # SHA-256 of its UTF-8
    size: int  # bytes of its UTF-8
    file_bytes: int  # how far its file was read for it (for progress)

    @property
    def text(self) -> str:
        """The whole of it."""
        with self.opened() as source:
            return source.read()

    def split(self, validation: float) -> str:
        """See `split_of`."""
        return split_of_digest(self.digest, validation)


@dataclass(frozen=True)
class SplitSummary:
    """How large one split is; `bytes` are the UTF-8 bytes of its text, without end-of-document tokens."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """What data.json says of a prepared corpus."""

    fingerprint: str  # of the inputs and of the options they were prepared with
    tokenizer: str
    vocab_size: int
    splits: dict[str, SplitSummary]
    # `Tokenizer.fingerprint` of it: data and models are of one tokenizer where theirs are equal. Empty: not known.
    tokenizer_fingerprint: str = ""
    skipped: int = 0  # bad records that were gone past
    duplicates: int = 0  # documents that were left out as copies of an earlier one

    def write(self, folder: Path) -> None:
        (folder / SUMMARY).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Summary | None:
        """The summary of a prepared folder; None when it has none, or a file of that name that tells of other things.

        Raises ValueError for a broken one.
        """
        file = folder / SUMMARY
        if not file.is_file():
            return None
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(fields, dict) or not {"fingerprint", "splits"} & fields.keys():
                return None
            splits = {name: SplitSummary(**split) for name, split in fields.pop("splits").items()}
            found = Summary(splits=splits, **fields)
            _check_types(found)
            for split in splits.values():
                _check_types(split)
            return found
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{file} is broken ({error}); remove {folder} and prepare it again with tools/prepare_data.py"
            ) from error


def _check_types(part: Summary | SplitSummary) -> None:
    """Raise TypeError for a field that holds what it cannot, as a file may that this tool did not write."""
    for name, kind in get_type_hints(type(part)).items():
        value = getattr(part, name)
        if kind in (str, int) and (type(value) is not kind or (kind is int and value < 0)):
            raise TypeError(f"{name} is {value!r}")


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs (`**` included) name, sorted, each once, none of them empty."""
    found: set[Path] = set()
    for pattern in patterns:
        # A file whose name holds glob characters is still a file.
        matches = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)
        files = {Path(match).resolve() for match in matches if Path(match).is_file()}
        if not files:
            hint = "name the files in it, e.g. as a glob" if Path(pattern).is_dir() else "correct the path or the glob"
            raise ValueError(f"{pattern!r} names no file; {hint}")
        found |= files
    for file in found:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty; leave it out")
    return sorted(found)


def fingerprint(files: Sequence[Path], options: str) -> str:
    """SHA-256 of the inputs' names, sizes and times and of the options: equal means nothing to prepare anew."""
    digest = hashlib.sha256(f"{options}\n".encode())
    for file in files:
        stat = file.stat()
        # Of a name that is no UTF-8, the bytes.
        digest.update(f"{file}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def split_of(text: str, validation: float) -> str:
    """The split of a document: by a hash of its text, so that copies of one text fall on one side."""
    return split_of_digest(hashlib.sha256(text.encode()).digest(), validation)


def split_of_digest(digest: bytes, validation: float) -> str:
    """The split of what has this SHA-256."""
    return "validation" if int.from_bytes(digest[:8], "big") < validation * 2**64 else "train"


def documents(file: Path, key: str, skipped: Skipped | None = None) -> Iterator[Document]:
    """The documents of a file: the records of JSON and of Parquet, or one of plain text; all may be compressed.

    Empty documents are left out. Raises ValueError naming the file and the record; with `skipped` what is bad is
    counted there instead.
    """
    found = _of_records(file, key, skipped) if holds_records(file) else _plain_text(file, skipped)
    return (document for document in found if document.size)


def _plain_text(file: Path, skipped: Skipped | None) -> Iterator[Document]:
    size = file.stat().st_size
    try:
        known = measured(file)
    except ValueError as error:
        go_past(error, skipped)
        return
    if known.size > HELD:
        yield Document(partial(opened_text, file), known.digest, known.size, size)
    else:
        with opened_text(file) as source:
            yield _held(source.read(), size)


def _of_records(file: Path, key: str, skipped: Skipped | None) -> Iterator[Document]:
    for record in records(file, key, skipped):
        try:
            text = text_at(record, key)
        except ValueError as error:
            go_past(error, skipped)
            continue
        yield _held(text, record.file_bytes)


def _held(text: str, file_bytes: int) -> Document:
    raw = text.encode()
    return Document(partial(io.StringIO, text, newline=""), hashlib.sha256(raw).digest(), len(raw), file_bytes)


def standard_library(limit_bytes: int) -> list[Path]:
    """Python's own standard-library sources, at most `limit_bytes` of them: real code and prose on every machine.

    Sorted by name, tests last; files that are empty, very large or not UTF-8 are left out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[tuple[bool, Path]] = []
    for file in root.rglob("*.py"):
        rooms = file.relative_to(root).parts
        if "site-packages" not in rooms:
            files.append(("test" in rooms or "tests" in rooms, file))
    chosen: list[Path] = []
    for _, file in sorted(files):
        size = file.stat().st_size
        if not 0 < size <= LARGEST_SOURCE or not is_utf8(file):
            continue
        if size > limit_bytes:
            break
        chosen.append(file)
        limit_bytes -= size
    return chosen
