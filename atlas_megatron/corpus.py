"""Text corpora: documents read from files, split by content, and the summary kept beside a prepared one.

Imports neither torch nor Megatron, so that preparation's worker processes start fast.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet

SUMMARY = "data.json"
SPLITS = ("train", "validation")
BYTES_A_READ = 1 << 20
ROWS_A_READ = 1024  # of a Parquet file
LARGEST_SOURCE = 200_000  # bytes; one library file larger than this would be most of a held-out split


@dataclass(frozen=True)
class Document:
    """One text and the share of its file's bytes that reading it took (for progress)."""

    text: str
    file_bytes: int


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

    def write(self, folder: Path) -> None:
        (folder / SUMMARY).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Summary | None:
        """The summary of a prepared folder; None when it has none. Raises ValueError for a broken one."""
        file = folder / SUMMARY
        if not file.is_file():
            return None
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            splits = {name: SplitSummary(**split) for name, split in fields.pop("splits").items()}
            return Summary(splits=splits, **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{file} is broken ({error}); remove {folder} and prepare it again with tools/prepare_data.py"
            ) from error


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
        digest.update(f"{file}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def split_of(text: str, validation: float) -> str:
    """The split of a document: by a hash of its text, so that copies of one text fall on one side."""
    digest = hashlib.sha256(text.encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < validation * 2**64 else "train"


def documents(file: Path, key: str) -> Iterator[Document]:
    """The documents of a file: one of plain text, one a line of .jsonl, one a row of .parquet.

    Empty documents are left out. Raises ValueError naming the file and the line or row.
    """
    readers = {".jsonl": _json_lines, ".parquet": _parquet_rows}
    reader = readers.get(file.suffix)
    found = reader(file, key) if reader else _plain_text(file)
    return (document for document in found if document.text)


def _plain_text(file: Path) -> Iterator[Document]:
    raw = file.read_bytes()
    yield Document(_decode(raw, f"{file}"), len(raw))


def _json_lines(file: Path, key: str) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            place = f"{file}, line {number}"
            if not raw.strip():
                continue
            try:
                record = json.loads(_decode(raw, place))
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON ({error}); mend or remove the line") from error
            yield Document(_text_of(record, key, place), len(raw))


def _parquet_rows(file: Path, key: str) -> Iterator[Document]:
    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} is not a Parquet file ({error}); mend it or leave it out") from error
    with table:
        if key not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise ValueError(f"{file} has no column {key!r} but {columns}; choose one with --key")
        share = file.stat().st_size // max(1, table.metadata.num_rows)
        row = 0
        for batch in table.iter_batches(ROWS_A_READ, columns=[key]):
            for record in batch.to_pylist():
                row += 1
                yield Document(_text_of(record, key, f"{file}, row {row}"), share)


def _text_of(record: object, key: str, place: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected an object with the key {key!r}, found {type(record).__name__}")
    if key not in record:
        raise ValueError(f"{place}: no key {key!r} but {', '.join(map(str, record))}; choose one with --key")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"{place}: {key!r} holds {type(text).__name__}, not text; mend or remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise ValueError(f"{place}: {key!r} is not valid Unicode ({error.reason}); mend or remove it") from error
    return text


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8; convert the file or leave it out"
        ) from error


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


def is_utf8(file: Path) -> bool:
    """Whether all of a file of any size is UTF-8 text."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    with file.open("rb") as source:
        try:
            while raw := source.read(BYTES_A_READ):
                decode(raw)
            decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True
