"""What gets its name when it is whole: a folder or a file, built beside its target under a name that is ours alone.

What a killed process left there is removed by the next; whatever else lies beside a target is the user's.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# In every scratch folder of ours, held locked by the process that builds there: the kernel lets go when it ends.
MARKER = "unfinished.json"
NEW, OLD = "new", "old"
# What follows a file's name while it is written; locked in the same way.
UNFINISHED = ".unfinished"
OF_A_FILE = re.compile(rf"\.[0-9a-f]{{16}}{re.escape(UNFINISHED)}")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when all has gone well, and is removed otherwise.

    Raises ValueError where the target exists.
    """
    remove_left(target)
    if os.path.lexists(target):
        raise ValueError(f"{target} exists; choose another target, or remove it first")
    with built_beside(target) as built:
        yield built
        if os.path.lexists(target):
            raise ValueError(f"{target} was made by somebody else meanwhile; choose another target")


@contextmanager
def file_beside(target: Path) -> Iterator[Path]:
    """An empty file to fill, which takes the place of `target` when all has gone well, and is removed otherwise.

    Raises ValueError where something else than a file is there, as a device.
    """
    if target.exists() and not target.is_file():
        raise ValueError(f"{target} is no file that can be replaced; move it away, or name another one")
    remove_left(target)
    early = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    marker = os.open(early, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    written = early
    try:
        # Locked before anybody takes it for one that was left; without locks it is never taken for one.
        if _locked(marker):
            written = early.with_name(f"{early.name}{UNFINISHED}")
            os.rename(early, written)
        yield written
        os.replace(written, target)
    finally:
        with suppress(FileNotFoundError):
            written.unlink()
        os.close(marker)


def refusal(directory: Path) -> str:
    """Why nothing can be written to a folder that is there or would be made; empty where it can."""
    there = next((path for path in (directory, *directory.parents) if os.path.lexists(path)), Path())
    if not there.is_dir():
        return f"{there} is no folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"nothing can be written to {there}"
    return ""


def write_whole(target: Path, text: str) -> None:
    """Write a text file: whoever reads it finds all of it, or what was there. Raises as `file_beside`."""
    with file_beside(target) as written:
        written.write_text(text, encoding="utf-8")


@contextmanager
def built_beside(target: Path) -> Iterator[Path]:
    """A folder to fill, which replaces `target` when all has gone well, and is removed otherwise.

    The caller has called `remove_left`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    marker = _mark(scratch, target)
    try:
        built = scratch / NEW
        built.mkdir()
        yield built
        if target.exists():
            os.rename(target, scratch / OLD)
        os.rename(built, target)
    finally:
        _put_back(scratch, target)
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(marker)


def _mark(scratch: Path, target: Path) -> int:
    """Write the marker, locked before anybody can see it; its open file."""
    early = scratch / f"{MARKER}.new"
    marker = os.open(early, os.O_RDWR | os.O_CREAT, 0o644)
    os.write(marker, json.dumps({"target": target.name}).encode())
    if not _locked(marker):
        # Nobody can then tell whether we live, so nobody removes it.
        early.unlink()
    else:
        os.rename(early, scratch / MARKER)
    return marker


def _locked(file: int) -> bool:
    """Lock a file for this process; False where another one holds it, or the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def remove_left(target: Path) -> None:
    """Remove what killed processes left beside `target`, marked as ours, and nothing else.

    Where one died between taking the earlier `target` away and putting the new one there, the earlier one comes back.
    """
    for scratch in list(target.parent.glob(f".{glob.escape(target.name)}.*")):
        if OF_A_FILE.fullmatch(scratch.name[len(target.name) + 1 :]):
            _remove_file(scratch)
            continue
        try:
            marker = os.open(scratch / MARKER, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue  # not ours
        try:
            if _locked(marker) and _is_of(marker, target):
                _put_back(scratch, target)
                shutil.rmtree(scratch, ignore_errors=True)
        finally:
            os.close(marker)


def _remove_file(left: Path) -> None:
    """Remove an unfinished file, unless the process that writes it lives."""
    try:
        marker = os.open(left, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if _locked(marker):
            left.unlink(missing_ok=True)
    finally:
        os.close(marker)


def _is_of(marker: int, target: Path) -> bool:
    try:
        return bool(json.loads(os.read(marker, 4096)) == {"target": target.name})
    except ValueError:
        return False


def _put_back(scratch: Path, target: Path) -> None:
    if (scratch / OLD).exists() and not target.exists():
        os.rename(scratch / OLD, target)
