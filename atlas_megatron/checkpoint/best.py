"""The best checkpoint of a run: of those saved after a validation, the one of the lowest loss. It is kept longest."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from atlas_megatron.checkpoint import step_folders
from atlas_megatron.files import integrity
from atlas_megatron.files.scratch import write_whole

FILE = "best.json"


@dataclass(frozen=True)
class Best:
    """Which one it is."""

    step: int
    validation_loss: float  # nats a token


def read(parent: Path) -> Best | None:
    """Of the folder that holds a run's checkpoints; None where none was noted that is still there."""
    try:
        said = json.loads((parent / FILE).read_text(encoding="utf-8"))
        best = Best(int(said["step"]), float(said["validation_loss"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return best if integrity.is_marked(parent / step_folders.name_of(best.step)) else None


def note(parent: Path, step: int, validation_loss: float) -> None:
    """Take the checkpoint of a step for the best where no other has a lower loss."""
    before = read(parent)
    if before and before.step != step and before.validation_loss <= validation_loss:
        return
    write_whole(parent / FILE, json.dumps(asdict(Best(step, validation_loss))))


def line(parent: Path) -> str:
    """For a run's last lines; empty where it has no best."""
    best = read(parent)
    if best is None:
        return ""
    return f"the best by validation loss, {best.validation_loss:.4f}: {parent / step_folders.name_of(best.step)}"
