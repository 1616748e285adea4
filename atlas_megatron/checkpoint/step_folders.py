"""Which folders beside each other are a run's checkpoints: `step_00000200`, with `.unfinished` behind it while written.

Whatever else lies there is the user's: a copy under another name, or under the number of another step. It is neither
read, nor counted, nor removed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from atlas_megatron.files import integrity

NAME = re.compile(r"step_(\d{8,15})")
# A name that no user gives: a copy `step_00000200.tmp` is theirs.
UNFINISHED = ".unfinished"


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The number in the name of a checkpoint, or of one that is being written; -1 for any other name."""
    found = NAME.fullmatch(folder.name.removesuffix(UNFINISHED))
    return int(found[1]) if found else -1


def checkpoints(parent: Path) -> list[Path]:
    """Whole, damaged and half-written ones, the newest first."""
    found = [path for path in _entries(parent) if path.suffix != UNFINISHED and is_ours(path)]
    return sorted(found, key=step_of, reverse=True)


def unfinished(parent: Path) -> list[Path]:
    """Those that were being written when their process was killed, or are being written, the newest first."""
    found = [path for path in _entries(parent) if path.suffix == UNFINISHED and step_of(path) >= 0]
    return sorted(found, key=step_of, reverse=True)


def is_ours(folder: Path) -> bool:
    """Whether the name is a checkpoint's, and its marker, where it can be read, is of the step in the name."""
    step = step_of(folder)
    if step < 0:
        return False
    try:
        return integrity.read_marker(folder).get("step", step) == step
    except (OSError, ValueError):
        return True


def remove(folder: Path) -> None:
    """Remove a checkpoint of ours; a link to one elsewhere stays, as a user made it."""
    if folder.is_symlink():
        return
    # First what makes it whole: killed in between, it is half-written and not damaged.
    (folder / integrity.MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def make_room(folder: Path) -> None:
    """Free the name of a checkpoint: an earlier one of that step is removed, what a user put there is renamed."""
    if not os.path.lexists(folder):
        return
    if folder.is_dir() and not folder.is_symlink() and is_ours(folder):
        remove(folder)
        return
    free = next(path for n in count(1) if not os.path.lexists(path := folder.with_name(f"{folder.name}.kept-{n}")))
    os.rename(folder, free)


def _entries(parent: Path) -> Iterator[Path]:
    try:
        yield from (path for path in parent.iterdir() if path.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return
