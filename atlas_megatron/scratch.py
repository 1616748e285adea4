"""A folder that gets its name when it is whole, built beside it; what a killed process left there is removed."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# In every scratch folder of ours, held locked by the process that builds there: the kernel lets go when it ends.
MARKER = "unfinished.json"
NEW, OLD = "new", "old"


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
    for scratch in target.parent.glob(f".{glob.escape(target.name)}.*"):
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


def _is_of(marker: int, target: Path) -> bool:
    try:
        return bool(json.loads(os.read(marker, 4096)) == {"target": target.name})
    except ValueError:
        return False


def _put_back(scratch: Path, target: Path) -> None:
    if (scratch / OLD).exists() and not target.exists():
        os.rename(scratch / OLD, target)
