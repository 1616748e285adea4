"""A fine-tuning run as it is planned: what it reads, how far gradients go, and whether it is done already."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atlas_megatron.config import uses
from atlas_megatron.data.records import Skipped
from atlas_megatron.finetune import checkpoints
from atlas_megatron.finetune.examples import Examples, Loader
from atlas_megatron.finetune.settings import Settings, check, check_budget, read_deepspeed, read_model
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.memory_atlas import reach_of
from atlas_megatron.hf.weights import check as check_weights
from atlas_megatron.hf.weights import described_in

REPORT = "finetune.json"  # what a folder that came out was trained with, and what the run said


@dataclass(frozen=True)
class Plan:
    """A checked run: nothing of it has been written yet."""

    settings: Settings
    config: AtlasConfig
    deepspeed: dict[str, Any] | None
    train: Examples
    validation: Examples | None
    world_size: int
    skipped: Skipped | None = None  # bad records that were left out
    done: bool = False  # the folder that comes out is there, and of this very run

    @property
    def segment(self) -> int:
        """Tokens; by default the length that the model was trained at."""
        return min(self.settings.segment or self.config.seq_length, self.train.longest)

    @property
    def reach(self) -> int:
        """Tokens after which gradients of memories end, as the exported model ends them in its own forward, where
        --detach-every is not given: those of its config.gradient_reach, or, for sequences longer than those of
        training, a quarter of that length. 0: they do not end for that."""
        ends = self.train.longest > (self.config.gradient_reach or self.config.seq_length)
        return self._bound if ends and self.settings.detach_every is None else 0

    @property
    def _bound(self) -> int:
        """As `reach`, whatever is asked for; 0 for a model without memories that gradients could explode in."""
        return reach_of(self.config) if uses(self.config.pattern, "memory") else 0

    @property
    def detach_every(self) -> int:
        """Segments over which gradients flow, 0 for all of them: given, or as `reach` asks."""
        if self.settings.detach_every is not None:
            return self.settings.detach_every
        return max(1, self.reach // self.segment) if self.reach else 0

    @property
    def window(self) -> int:
        """Tokens over which gradients flow at most."""
        whole = self.train.longest
        return min(whole, self.detach_every * self.segment) if self.detach_every else whole

    @property
    def gradients(self) -> str:
        """Where gradients end, in words."""
        if not self.reach:
            return f"detached every {self.detach_every} segments" if self.detach_every else "over every cut"
        ends = min(self.reach, self.detach_every * self.segment)
        return f"detached every {self.detach_every} segments, those of memories every {ends:,} tokens"

    @property
    def on_length(self) -> str:
        """A line on gradients and the length of training; empty where it bounds nothing."""
        trained, longest = self.config.seq_length, self.train.longest
        if self.reach:
            return (
                f"sequences of up to {longest:,} tokens, {trained:,} in training: gradients do not pass further than "
                "the exported model's own; --detach-every 0 lets them pass over every cut"
            )
        if self._bound and self.window > trained:
            return (
                f"warning: gradients pass over up to {self.window:,} tokens, more than the {trained:,} of training, "
                "and may explode; leave out --detach-every, or watch the gradient norm"
            )
        return ""

    @property
    def checkpointing(self) -> bool:
        """Unless it is said: where the gradients go over cuts."""
        chosen = self.settings.checkpointing
        return self.detach_every != 1 and self.train.longest > self.segment if chosen is None else chosen

    @property
    def steps(self) -> int:
        """An epoch's last may have fewer micro-batches than the others; a micro-batch that is not full is left out."""
        micro_batches = self.train.sequences // (self.settings.micro_batch * self.world_size)
        steps_an_epoch = math.ceil(micro_batches / self.settings.accumulation(self.world_size))
        return self.settings.steps or math.ceil(steps_an_epoch * self.settings.epochs)

    def identity(self) -> dict[str, Any]:
        """What must be the same where a run goes on from a checkpoint."""
        far: int | str = self.detach_every
        if self.reach:
            far = f"left to the length of training ({far}, memories after {self.reach} tokens)"
        return self.settings.decides() | {
            "detach_every": far,
            "steps": self.steps,
            "segment": self.segment,
            "sequences": self.train.sequences,
            "tokens": self.train.tokens,
            "devices": self.world_size,
            "deepspeed": self.deepspeed,
        }


def world_size() -> int:
    """Processes of this run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def plan(settings: Settings, devices: int) -> Plan:
    """Check everything that can be wrong, and read the data. Raises ValueError."""
    check(settings, devices)
    there = _settings_of(settings.out)
    if there is not None:
        # Before the data are read, which may take long.
        _refuse_other(settings.out, there, {k: v for k, v in settings.decides().items() if k != "detach_every"})
    config = read_model(settings.model)
    check_budget(settings, config)
    deepspeed = read_deepspeed(settings.deepspeed) if settings.deepspeed else None
    loader = Loader(settings, config)
    # First: it is the smaller one, and nothing else says sooner that there is none in it.
    validation = loader.load(settings.validation) if settings.validation else None
    train = loader.load(settings.data)
    if train.sequences < settings.batch:
        raise ValueError(
            f"the data hold {train.sequences} sequences, fewer than --batch {settings.batch}; give more data, a "
            "smaller --length or a smaller --batch"
        )
    planned = Plan(settings, config, deepspeed, train, validation, devices, loader.skipped)
    if settings.warmup >= planned.steps:
        raise ValueError(
            f"--warmup {settings.warmup} must be less than the {planned.steps:,} steps of the run; give a smaller one, "
            "more data, or more --epochs or --steps"
        )
    if there is None:
        return planned
    ours = json.loads(json.dumps(planned.identity()))
    _refuse_other(settings.out, there, dict.fromkeys(there) | ours)
    check_weights(settings.out, described_in(settings.out))
    return replace(planned, done=True)


def _settings_of(out: Path) -> dict[str, Any] | None:
    """What a folder that came out was trained with; None where nothing is there. Raises ValueError for any other."""
    if not out.exists() and not out.is_symlink():
        return None
    try:
        said = json.loads((out / REPORT).read_bytes())["settings"]
        if isinstance(said, dict):
            return said
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(
        f"--out {out} exists and holds no {REPORT} of a run; nothing is written over: choose another, or remove it"
    )


def _refuse_other(out: Path, there: dict[str, Any], ours: dict[str, Any]) -> None:
    changed = checkpoints.changed(ours, there)
    if changed:
        raise ValueError(
            f"--out {out} exists, of a run with other settings: {changed}; nothing is written over: choose another, or "
            "remove it"
        )
