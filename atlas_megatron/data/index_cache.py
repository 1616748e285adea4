"""Megatron's sample indices on the disk, each whole or built again.

Core writes them in place, and takes whatever lies there for whole: a run that was killed meanwhile could not start any
more. Here a marker lists what was whole, and what it does not vouch for is removed before core looks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from atlas_megatron.files import integrity
from atlas_megatron.parallel import world

MARKER = "whole.json"
SUFFIXES = (".npy", ".txt")  # of the files that core writes
NUMPY = b"\x93NUMPY"  # what an array begins with; numpy would unpickle anything else


@contextmanager
def kept_whole(folder: Path) -> Iterator[None]:
    """Within: core builds its indices there, or finds whole ones. Every process of the run calls it."""
    if world.rank() == 0:
        _drop_unfinished(folder)
    # Nobody looks before that is done.
    world.from_first([None])
    yield
    if world.rank() == 0 and folder.is_dir():
        known = _vouched(folder)
        # Where nothing can be written, core had nothing to write.
        if {file.name for file in _files(folder)} != known.keys():
            with suppress(PermissionError):
                integrity.mark(folder, {}, known, MARKER)


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES] if folder.is_dir() else []


def _vouched(folder: Path) -> dict[str, str]:
    """The checksums in the marker, by name; none where it is absent or damaged."""
    try:
        return integrity.read_marker(folder, MARKER)["crc32"]
    except (OSError, ValueError):
        return {}


def _drop_unfinished(folder: Path) -> None:
    """Remove what the marker does not know, or knows otherwise; core builds it again."""
    sums = _vouched(folder)
    for file in _files(folder):
        if sums.get(file.name) != integrity.checksum(file) or not _is_plain(file):
            file.unlink()


def _is_plain(file: Path) -> bool:
    """Whether it is no array, or one that numpy reads without unpickling anything."""
    if file.suffix != ".npy":
        return True
    with file.open("rb") as stream:
        return stream.read(len(NUMPY)) == NUMPY
