"""What a run leaves and says when a GPU's memory does not suffice: a snapshot of it, and what to change."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from atlas_megatron.config import Config
from atlas_megatron.config.checks import validate
from atlas_megatron.estimate.memory import footprint, fullest
from atlas_megatron.estimate.room import said
from atlas_megatron.model.build import parameter_dtype
from atlas_megatron.parallel import world


def explained(error: torch.OutOfMemoryError, config: Config, step: int) -> ValueError:
    """The error that a run ends with: where it stood, what would take less, and where the snapshot lies.

    step: the one that was not finished.
    """
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)", str(error))
    wanted = f" for {asked[1]} more" if asked else ""
    ways = "; ".join(remedies(config, world.size())) or "a smaller model or model.seq_length"
    snapshot = written(config, step)
    where = f"; its snapshot is {snapshot}" if snapshot else ""
    return ValueError(
        f"step {step}: the memory of rank {world.rank()}'s device does not suffice{wanted}; what would take less, by "
        f"estimate: {ways}{where}"
    )


def remedies(config: Config, world_size: int) -> list[str]:
    """Changes that make the fullest rank hold less and fit together, each with its key, value and estimated size."""
    train, parallel = config.train, config.parallel
    half = next((size for size in range(train.micro_batch // 2, 0, -1) if train.micro_batch % size == 0), None)
    found = []
    if half:
        found.append((f"train.micro_batch={half} (is {train.micro_batch})", _with(config, "train", micro_batch=half)))
    if not train.recompute:
        found.append(("train.recompute=true (is false)", _with(config, "train", recompute=True)))
    for axis in ("tensor", "context"):
        now = getattr(parallel, axis)
        changed: dict[str, Any] = {axis: 2 * now} | ({"sequence": True} if axis == "tensor" else {})
        said_so = f"parallel.{axis}={2 * now}" + (" with parallel.sequence=true" if axis == "tensor" else "")
        found.append((f"{said_so} (is {now})", _with(config, "parallel", **changed)))
    before = _held(config, world_size)
    lines: list[str] = []
    for line, other in found:
        # More devices than there are, where an axis asks for them.
        size = max(world_size, other.parallel.tensor * other.parallel.context * other.parallel.pipeline)
        with suppress(ValueError):
            validate(other, size)
            if (after := _held(other, size)) < before:
                lines.append(f"{line}: about {said(after)} instead of {said(before)} a device")
    return lines


def written(config: Config, step: int) -> Path | None:
    """The file of torch's snapshot of this GPU's memory, for pytorch.org/memory_viz; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    path = Path(config.run.directory, f"memory_step_{step}_rank_{world.rank()}.pickle")
    try:
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError):
        # The disk may be full too: what to change is said in any case.
        return None
    return path


def _with(config: Config, section: str, **changed: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **changed)})


def _held(config: Config, world_size: int) -> float:
    """Bytes, by estimate."""
    bf16 = parameter_dtype(config).itemsize == 2
    return footprint(config, world_size, fullest(config, world_size, bf16=bf16), bf16=bf16).total
