"""Records of files: JSON lines, lists and single objects of JSON, rows of Parquet; each with the place it stands at."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import pyarrow
import pyarrow.parquet as parquet

from atlas_megatron.data.text_files import BYTES_A_READ, MARK, decoded, opened, suffix_of

JSON_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", ".json")
PARQUET_SUFFIXES = (".parquet", ".pq")
ROWS_A_READ = 256
NAMED = 20  # of the bad records
# A syntax error this far before the end of what was read is one; nearer to it more may follow.
TOKEN = 16


@dataclass(frozen=True)
class Record:
    """One object of a file; file_bytes: how far the file was read for it, for progress."""

    place: str
    values: dict[str, object]
    file_bytes: int


@dataclass
class Skipped:
    """Bad records that are gone past: how many, and the first of them in words."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, error: ValueError) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(str(error))

    def __str__(self) -> str:
        """What a command says of them, a line each."""
        named = "the first of them" if self.count > len(self.named) else "namely"
        return "\n  ".join([f"left out {self.count:,} bad records, {named}:", *self.named])


def go_past(error: ValueError, skipped: Skipped | None) -> None:
    """Count a bad record where that is asked for; raise the error otherwise."""
    if skipped is None:
        raise error
    skipped.add(error)


def holds_records(file: Path) -> bool:
    """Whether a file's name says that it holds JSON or Parquet, and not plain text."""
    return suffix_of(file) in JSON_SUFFIXES + PARQUET_SUFFIXES


def records(file: Path, column: str = "", skipped: Skipped | None = None) -> Iterator[Record]:
    """The records of a file, compressed or not.

    column: of Parquet the one to read, `a.b` for a field of a struct; all where it is empty. Raises ValueError naming
    the file and the record; with `skipped` a bad record is counted there, and the next one follows.
    """
    if suffix_of(file) in PARQUET_SUFFIXES:
        yield from _rows(file, column)
        return
    for place, value, share in _json(file, skipped):
        if isinstance(value, dict):
            yield Record(place, value, share)
        else:
            kind = type(value).__name__
            go_past(ValueError(f"{place}: expected an object, found {kind}; mend or remove it"), skipped)


def value_at(values: dict[str, object], key: str) -> object:
    """What a record holds under a key, or under a path of keys and places in lists: `meta.text`, `messages.0.content`.

    Raises KeyError where there is nothing.
    """
    if key in values:
        return values[key]
    value: object = values
    for part in key.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise KeyError(key)
    return value


def text_at(record: Record, key: str) -> str:
    """The text of a record under a key. Raises ValueError naming its place."""
    try:
        text = value_at(record.values, key)
    except KeyError:
        names = ", ".join(map(str, record.values))
        raise ValueError(f"{record.place}: no key {key!r} but {names}; choose one with --key") from None
    if not isinstance(text, str):
        raise ValueError(f"{record.place}: {key!r} holds {type(text).__name__}, not text; mend or remove it")
    check_unicode(text, key, record.place)
    return text


def check_unicode(text: str, key: str, place: str) -> None:
    """Raise ValueError for text that cannot be written as UTF-8: JSON can spell half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: {key!r} is not valid Unicode ({error.reason}); mend or remove it") from error


def _json(file: Path, skipped: Skipped | None) -> Iterator[tuple[str, object, int]]:
    """(place, value, bytes of the file) of each value: one a line, or those of a list, or one after the other."""
    with opened(file) as found:
        first = next((line for line in found.bytes if line.strip()), b"")
    # A list, or an object over several lines, which .json alone may hold.
    if _start(first) == "[" or (suffix_of(file) == ".json" and not _is_json(first)):
        yield from _values(file)
    else:
        yield from _lines(file, skipped)


def _lines(file: Path, skipped: Skipped | None) -> Iterator[tuple[str, object, int]]:
    with opened(file) as found:
        read = 0
        for number, raw in enumerate(found.bytes, start=1):
            if not raw.strip():
                continue
            place = f"{file}, line {number}"
            try:
                value = _parsed(raw, place)
            except ValueError as error:
                go_past(error, skipped)
                continue
            share, read = found.place() - read, found.place()
            yield place, value, share


def _values(file: Path) -> Iterator[tuple[str, object, int]]:
    """The values of a file that is not one a line. A syntax error ends it: nothing says where the next one begins."""
    with opened(file) as found, io.TextIOWrapper(found.bytes, encoding="utf-8-sig") as text:
        values, read = _Values(text), 0
        for number in itertools.count(1):
            place = f"{file}, record {number}"
            try:
                value = next(values)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: not UTF-8 ({error.reason}); convert the file or leave it out") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON ({error.msg}); mend the file") from error
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists
                raise ValueError(f"{place}: cannot be read ({error}); mend or remove it") from error
            share, read = found.place() - read, found.place()
            yield place, value, share


class _Values(Iterator[object]):
    """JSON values out of a text of any length, of which hardly more than one is held."""

    def __init__(self, text: TextIO) -> None:
        self._text, self._buffer, self._at = text, "", 0
        self._decode = json.JSONDecoder().raw_decode
        self._first, self._listed = True, False

    def __next__(self) -> object:
        following = self._next()
        if self._first and following == "[":
            self._listed, self._at = True, self._at + 1
            following = self._next()
        if self._listed:
            if following == "]":
                self._at += 1
                self._listed = False
                if self._next():
                    raise json.JSONDecodeError("something follows the list", self._buffer, self._at)
                raise StopIteration
            if not self._first:
                if following != ",":
                    raise json.JSONDecodeError("expecting ',' or the end of the list", self._buffer, self._at)
                self._at += 1
                self._next()
        elif not following:
            raise StopIteration
        self._first = False
        return self._value()

    def _value(self) -> object:
        while True:
            try:
                value, end = self._decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                # What is not finished yet may still become a value.
                unfinished = error.msg.startswith("Unterminated string") or error.pos + TOKEN > len(self._buffer)
                if not unfinished or not self._more():
                    raise
                continue
            # A number may go on.
            if end < len(self._buffer) or isinstance(value, dict | list | str) or not self._more():
                self._at = end
                return value

    def _next(self) -> str:
        """The next character that is no blank, which is not taken; empty at the end."""
        while True:
            while self._at < len(self._buffer):
                if not self._buffer[self._at].isspace():
                    return self._buffer[self._at]
                self._at += 1
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Read on: as much again as is held, so that a long value is not tried too often."""
        held = self._buffer[self._at :]
        read = self._text.read(max(BYTES_A_READ, len(held)))
        self._buffer, self._at = held + read, 0
        return bool(read)


def _start(raw: bytes) -> str:
    """The first character that is no blank; empty where there is none."""
    return raw.decode("utf-8", errors="replace").removeprefix(MARK).strip()[:1]


def _is_json(raw: bytes) -> bool:
    try:
        _parsed(raw, "")
    except ValueError:
        return False
    return True


def _parsed(raw: bytes, place: str) -> object:
    text = decoded(raw, place)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error}); mend or remove the line") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, lists in lists
        raise ValueError(f"{place}: cannot be read ({error}); mend or remove the line") from error


def _rows(file: Path, column: str) -> Iterator[Record]:
    try:
        table = parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} is not a Parquet file ({error}); mend it or leave it out") from error
    with table:
        names = table.schema_arrow.names
        whole = column if column in names else column.partition(".")[0]
        if column and whole not in names:
            raise ValueError(f"{file} has no column {column!r} but {', '.join(names)}; choose one with --key")
        share = file.stat().st_size // max(1, table.metadata.num_rows)
        row = 0
        try:
            for batch in table.iter_batches(ROWS_A_READ, columns=[whole] if column else None):
                for values in batch.to_pylist():
                    row += 1
                    yield Record(f"{file}, row {row}", values, share)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise ValueError(f"{file}, after row {row}: cannot be read ({error}); restore it") from error
