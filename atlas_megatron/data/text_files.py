"""Files of text as they come: compressed or not, with a byte order mark or without, checked to be UTF-8.

Imports neither torch nor Megatron, so that preparation's worker processes start fast.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import lzma
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import pyarrow

BYTES_A_READ = 1 << 20
MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"  # the byte order mark, as a character
COMPRESSED = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz"}
# What files of a kind begin with. None of the compressed ones is UTF-8, so a name cannot make text of them.
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
BZIP2 = b"BZh"
ARCHIVES = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive", b"%PDF-": "a PDF document"}
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
TAR, TAR_AT = b"ustar", 257


@dataclass(frozen=True)
class Opened:
    """A file's bytes, unpacked. place: how many bytes of the file itself have been read."""

    bytes: BinaryIO
    place: Callable[[], int]


@dataclass(frozen=True)
class Measured:
    """What is known of a text after it was read once: the SHA-256 and the size of its UTF-8, without a mark."""

    digest: bytes
    size: int


def suffix_of(file: Path) -> str:
    """What a file's name says of its content: its last suffix in lower case, a suffix of compression apart."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def opened(file: Path) -> Iterator[Opened]:
    """A file of text, compressed or not.

    Raises ValueError where it is an archive, a document of another program, or compressed and broken.
    """
    with file.open("rb", buffering=0) as raw:
        begin = raw.read(TAR_AT + len(TAR))
        raw.seek(0)
        kind = _compression(file, begin)
        # Only what is not compressed can be told from its first bytes; of the rest, what comes out of it.
        with _unpacked(raw, kind) as content:
            reader = io.BufferedReader(cast(Any, content), BYTES_A_READ)
            try:
                _refuse_archives(file, reader.peek(TAR_AT + len(TAR)))
                yield Opened(cast(BinaryIO, reader), raw.tell)
            except (OSError, EOFError, lzma.LZMAError) as error:
                if kind is None or getattr(error, "errno", None):
                    raise  # of the disk
                raise ValueError(f"{file} is {kind} data that cannot be unpacked ({error}); restore it") from error


def _compression(file: Path, begin: bytes) -> str | None:
    for magic, kind in MAGIC.items():
        if begin.startswith(magic):
            return kind
    return "bz2" if begin.startswith(BZIP2) and COMPRESSED.get(file.suffix.lower()) == "bz2" else None


@contextmanager
def _unpacked(raw: io.FileIO, kind: str | None) -> Iterator[Any]:
    if kind is None:
        yield raw
    elif kind == "xz":
        with lzma.open(raw) as content:
            yield content
    else:
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), kind) as content:
            yield content


def _refuse_archives(file: Path, begin: bytes) -> None:
    for magic, kind in ARCHIVES.items():
        if begin.startswith(magic):
            raise ValueError(f"{file} is {kind}; unpack it and name the files of text in it")
    if begin[TAR_AT : TAR_AT + len(TAR)] == TAR:
        raise ValueError(f"{file} is a tar archive; unpack it and name the files of text in it")
    if begin.startswith(UTF_16):
        raise ValueError(f"{file} is UTF-16 text; convert it, e.g. with iconv -f UTF-16 -t UTF-8")


@contextmanager
def opened_text(file: Path) -> Iterator[TextIO]:
    """The text of a file without a byte order mark, line ends as they are; the caller has seen that it is UTF-8."""
    with opened(file) as found, io.TextIOWrapper(found.bytes, encoding="utf-8-sig", newline="") as text:
        yield text


@contextmanager
def standard_input() -> Iterator[TextIO]:
    """Standard input as UTF-8 without a byte order mark, whatever the locale; bytes that are none are replaced.

    Raises ValueError where it is closed.
    """
    if sys.stdin is None:
        raise ValueError("standard input is closed; give a file")
    buffer = getattr(sys.stdin, "buffer", None)
    if buffer is None:
        yield sys.stdin  # text already
        return
    text = io.TextIOWrapper(buffer, encoding="utf-8-sig", errors="replace")
    try:
        yield text
    finally:
        text.detach()


def measured(file: Path) -> Measured:
    """Read a text of any size once. Raises ValueError naming its first byte that is not UTF-8."""
    digest, size, done = hashlib.sha256(), 0, 0
    decoder = codecs.getincrementaldecoder("utf-8")()
    with opened(file) as found:
        while True:
            raw = found.bytes.read(BYTES_A_READ)
            waiting = len(decoder.getstate()[0])
            try:
                decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                at, byte = done - waiting + error.start, error.object[error.start]
                raise ValueError(not_utf8(f"{file}", at, byte)) from error
            if not raw:
                return Measured(digest.digest(), size)
            text = raw.removeprefix(codecs.BOM_UTF8) if done == 0 else raw
            digest.update(text)
            done, size = done + len(raw), size + len(text)


def decoded(raw: bytes, place: str) -> str:
    """UTF-8 text without a byte order mark. Raises ValueError naming the place and the byte."""
    try:
        return raw.decode("utf-8").removeprefix(MARK)
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(place, error.start, raw[error.start])) from error


def not_utf8(place: str, at: int, byte: int) -> str:
    return f"{place}: byte {at} (0x{byte:02x}) is not UTF-8; convert the file or leave it out"


def is_utf8(file: Path) -> bool:
    """Whether all bytes of a file of any size, as they lie there, are UTF-8 text."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    with file.open("rb") as source:
        try:
            while raw := source.read(BYTES_A_READ):
                decode(raw)
            decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True
