"""Checkpoints of fine-tuning: `OUT.training/checkpoint-N`, as safe as a run's.

A marker lists the size and checksum of every file, so that a damaged one is named and the one before it taken. Other
folders beside them, as a user's copies, are neither read nor removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from atlas_megatron.files import integrity

NAME = re.compile(r"checkpoint-(\d{1,15})")
MARKER = "whole.json"  # of a checkpoint that was written to its end
SET_ASIDE = "damaged.json"  # the marker of one that was found damaged, and of those after it
IDENTITY = "identity"  # of the run, in the marker
# What DeepSpeed's own files name besides tensors; it unpickles them without limits.
OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def step_of(folder: Path) -> int:
    """The number in the name of a checkpoint; -1 for any other name."""
    found = NAME.fullmatch(folder.name)
    return int(found[1]) if found else -1


def all_in(work: Path) -> list[Path]:
    """The checkpoints in a run's folder of work, the newest first."""
    folders = [path for path in work.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(folders, key=step_of, reverse=True)


def changed(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """In which of our settings a run is another, in words; empty where in none."""
    names = [name for name in ours if ours[name] != theirs.get(name)]
    return "; ".join(f"{name} is {ours[name]!r}, was {theirs.get(name)!r}" for name in names)


def mark(folder: Path, identity: dict[str, Any]) -> None:
    """Make a checkpoint whole, once all of it is written."""
    integrity.mark(folder, {IDENTITY: identity}, {}, MARKER)


def make_room(folder: Path) -> None:
    """Remove what lies where a checkpoint is about to be written: it was damaged, or not written to its end."""
    if folder.is_dir() and not folder.is_symlink():
        _remove(folder)


def drop_old(work: Path, keep: int) -> None:
    """Remove all but the newest whole checkpoints, and what killed processes left before them."""
    found = all_in(work)
    kept = [path for path in found if (path / MARKER).is_file()][:keep]
    for path in found:
        if kept and step_of(path) < step_of(kept[-1]) and not path.is_symlink():
            _remove(path)


def newest(work: Path, identity: dict[str, Any]) -> Path | None:
    """The newest undamaged checkpoint of a run; None where it has none yet. Damaged ones are named on standard error.

    Raises ValueError where it is of other settings, would run code, or all that were whole are damaged now.
    """
    first = os.environ.get("RANK", "0") == "0"
    damaged: list[Path] = []
    said: list[str] = []
    for folder in all_in(work):
        if not (folder / MARKER).is_file():
            continue
        bad = _wrong(folder, identity, work)
        if not bad:
            for line in said if first else ():
                print(f"finetune: skipped the damaged checkpoint {line}", file=sys.stderr)
            for later in damaged if first else ():
                os.replace(later / MARKER, later / SET_ASIDE)
            return folder
        damaged.append(folder)
        said.append(f"{folder}: {bad}")
    if damaged:
        raise ValueError(
            f"no checkpoint in {work} is left undamaged ({'; '.join(said)}); bring the files back from a copy, or, to "
            f"begin anew, remove {work}"
        )
    return None


def _wrong(folder: Path, identity: dict[str, Any], work: Path) -> str:
    """What is wrong with a marked checkpoint; empty where nothing is. Raises ValueError as `newest` does."""
    try:
        said = json.loads((folder / MARKER).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"{MARKER} cannot be read ({error})"
    if isinstance(said, dict) and "files" not in said and said:
        # Written before there were checksums, which it has nothing to be compared with.
        theirs = said
    else:
        bad = integrity.wrong_size(folder, MARKER) or integrity.wrong_content(folder, name=MARKER)
        if bad:
            return bad
        theirs = said.get(IDENTITY)
        if not isinstance(theirs, dict):
            return f"{MARKER} does not say of which run it is"
    _check_identity(folder, identity, theirs, work)
    _check_pickles(folder)
    return ""


def _check_identity(folder: Path, ours: dict[str, Any], theirs: dict[str, Any], work: Path) -> None:
    found = changed(ours | dict.fromkeys(theirs.keys() - ours.keys()), theirs)
    if found:
        raise ValueError(
            f"{folder} is of a run with other settings: {found}; give those of it, another --out, or "
            f"remove {work}"
        )


def _check_pickles(folder: Path) -> None:
    """Raise ValueError where a file of DeepSpeed's would run what does not belong to it."""
    for file in _of_deepspeed(folder):
        try:
            named = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(file)))
        except Exception as error:  # a zip or a pickle can be damaged in any way
            raise ValueError(f"{file} is no file of DeepSpeed's ({error}); remove {folder}") from error
        strange = sorted(named - OF_DEEPSPEED)
        if strange:
            raise ValueError(f"{file} would run {strange[0]}, which no checkpoint of ours holds; remove {folder}")


def _of_deepspeed(folder: Path) -> Iterator[Path]:
    for inner in folder.iterdir():
        if inner.is_dir():
            yield from sorted(file for file in inner.rglob("*") if file.suffix in (".pt", ".pth", ".bin"))


def _remove(folder: Path) -> None:
    # First what makes it whole: killed in between, it is half-written and not damaged.
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)
