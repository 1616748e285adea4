"""Long work that outlives its process, in a folder beside the target: the next start of it goes on from there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from atlas_megatron.files.scratch import write_whole

LOCK, STATE, WORK = "lock", "state.json", "work"


class Resumable:
    """A folder to fill, and what was last saved about its content."""

    def __init__(self, folder: Path, mark: str, state: dict[str, Any] | None) -> None:
        """state: as it was saved by an earlier start of this very work; None where there is none."""
        self.work, self.state = folder / WORK, state
        self._file, self._mark = folder / STATE, mark

    @property
    def saved(self) -> bool:
        """Whether another start could go on from here."""
        return self.state is not None

    def save(self, state: dict[str, Any]) -> None:
        """Note where the work stands. The caller has brought its files to the disk."""
        write_whole(self._file, json.dumps({"mark": self._mark, "state": state}))
        self.state = state


def folder_beside(target: Path) -> Path:
    """Where unfinished work on `target` lies."""
    return target.parent / f".{target.name}.resumable"


@contextmanager
def resumable_beside(target: Path, mark: str) -> Iterator[Resumable]:
    """Work on `target` in a folder beside it. The folder goes when the work is done, or failed with nothing saved.

    mark: what the work is. What was saved under another mark is removed. Raises ValueError where another process works
    on the same target, and where a folder of that name is somebody else's.
    """
    folder = folder_beside(target)
    lock = _locked(folder, target)
    try:
        state = _saved(folder, mark)
        if state is None:
            shutil.rmtree(folder / WORK, ignore_errors=True)
            (folder / STATE).unlink(missing_ok=True)
        found = Resumable(folder, mark, state)
        found.work.mkdir(exist_ok=True)
        try:
            yield found
        except BaseException:
            if not found.saved:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _locked(folder: Path, target: Path) -> int:
    """The open lock of a folder, which is made if need be."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / LOCK).exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} was not made by this tool; move it away")
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(lock)
                raise ValueError(f"another process prepares {target}; wait for it, or name another folder") from error
            # A file system without locks: nobody can tell, so the work goes on.
        if os.fstat(lock).st_nlink:
            return lock
        # Whoever held it was done, and has removed the folder meanwhile.
        os.close(lock)


def _saved(folder: Path, mark: str) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        said = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if isinstance(said, dict) and said.get("mark") == mark and isinstance(said.get("state"), dict):
            return said["state"]
    return None
