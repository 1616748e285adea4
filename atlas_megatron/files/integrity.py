"""Whether a checkpoint is what was written: its marker holds the size and the checksum of every file.

The checksum is CRC-32, which finds what disks and copies do to a file, not what somebody does on purpose. Files are
read as streams, about 1.2 GB/s on one quiet core of a CPU; each process reads its share.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from atlas_megatron.files.scratch import file_beside, remove_left

MARKER = "complete.json"
LARGEST_MARKER = 64 << 20  # bytes; of a hundred thousand files it has twenty million
# What file systems say of a call that they do not offer.
NOT_OFFERED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EBADF)
BLOCK = 1 << 22  # bytes read at a time


def checksum(file: Path) -> str:
    """CRC-32 of a file, in hexadecimal digits. Raises OSError where it cannot be read."""
    value = 0
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(BLOCK):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def checksums(files: Iterable[Path]) -> dict[str, str]:
    """The checksum of each file, by its name."""
    return {file.name: checksum(file) for file in files}


def read_marker(folder: Path, name: str = MARKER) -> dict[str, Any]:
    """What a marker says: `files`, sizes by name; `crc32`, checksums by name, empty where it is from before there were
    any; and whatever else was given to `mark`.

    Raises ValueError where it is of another form, OSError where it cannot be read.
    """
    file = folder / name
    size = file.stat().st_size
    if size > LARGEST_MARKER:
        raise ValueError(f"{size:,} bytes are more than any marker has")
    try:
        said = json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested without end") from error
    if not isinstance(said, dict):
        raise ValueError(f"it holds a {type(said).__name__}, not an object")
    files, sums = said.get("files"), said.setdefault("crc32", {})
    if not isinstance(files, dict) or not all(type(size) is int and size >= 0 for size in files.values()):
        raise ValueError("its files are not sizes by name")
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise ValueError("its crc32 are not checksums by name")
    for path in (*files, *sums):
        inner = PurePosixPath(path)
        if inner.is_absolute() or ".." in inner.parts or "\0" in path:
            raise ValueError(f"it names {path!r}, which is not beside it")
    return said


def digest(folder: Path) -> str:
    """What tells a marked checkpoint's bytes from all others, from the checksums in its marker. Raises as
    `read_marker`."""
    marker = read_marker(folder)
    return hashlib.sha256(json.dumps([marker["files"], marker["crc32"] or None], sort_keys=True).encode()).hexdigest()


def mark(folder: Path, says: dict[str, Any], known: dict[str, str], name: str = MARKER) -> None:
    """Bring a checkpoint's files to the disk, then the marker that makes it whole, and that also says `says`.

    known: checksums of its files that are there already; the others are computed here.
    """
    remove_left(folder / name)
    paths = sorted(path for path in folder.rglob("*") if path.name != name)
    for path in paths:
        sync(path)
    files = {path.relative_to(folder).as_posix(): path for path in paths if path.is_file()}
    sums = {path: known[path] if path in known else checksum(file) for path, file in files.items()}
    sizes = {path: file.stat().st_size for path, file in files.items()}
    with file_beside(folder / name) as unnamed:
        unnamed.write_text(json.dumps(says | {"files": sizes, "crc32": sums}, indent=1))
        sync(unnamed)
    sync(folder)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    folder = path.is_dir()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Many network and FUSE file systems do not take it of a folder.
        if not folder or error.errno not in NOT_OFFERED:
            raise
    finally:
        os.close(descriptor)


def is_marked(folder: Path) -> bool:
    """Whether the checkpoint was whole once; what is still written, or was killed meanwhile, never was."""
    return folder.suffix == "" and (folder / MARKER).is_file()


def wrong_size(folder: Path, name: str = MARKER) -> str:
    """What is wrong with a marked checkpoint, as far as names and sizes tell; empty where nothing is."""
    try:
        files = read_marker(folder, name)["files"]
        if not files:
            return f"{name} lists no files"
        for path, size in files.items():
            file = folder / path
            if not file.is_file():
                return f"{path} is missing"
            if file.stat().st_size != size:
                return f"{path} has {file.stat().st_size} of {size} bytes"
    except (OSError, ValueError) as error:
        return f"{name} cannot be read ({error})"
    return ""


def wrong_content(folder: Path, share: int = 0, shares: int = 1, name: str = MARKER) -> str:
    """What is wrong with the bytes of every `shares`-th file from number `share` on; empty where nothing is.

    Checkpoints written before there were checksums have nothing to be compared with.
    """
    try:
        sums = read_marker(folder, name)["crc32"]
    except (OSError, ValueError) as error:
        return f"{name} cannot be read ({error})"
    for path in sorted(sums)[share::shares]:
        try:
            found = checksum(folder / path)
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        if found != sums[path]:
            return f"{path} is not what was written: its checksum is {found}, not {sums[path]}"
    return ""
