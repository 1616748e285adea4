"""What a run says when it goes on with other keys than it had."""

from __future__ import annotations

from atlas_megatron.config import Config
from atlas_megatron.config_differences import differences
from atlas_megatron.optimizer import learning_rate

# What the schedule is made of.
SCHEDULE = ("train.lr=", "train.min_lr=", "train.steps=", "train.warmup_steps=")


def changed_keys(config: Config, before: Config, step: int) -> str:
    """One line: the keys that differ from those a run had at `step`, and what follows; empty where none does."""
    changed = differences(config, before)
    if not changed or not step:
        return ""
    said = f"these keys differ from the run's: {', '.join(changed)}"
    if step >= config.train.steps:
        return f"{said}; it is done, and nothing is trained with them: raise train.steps, or name another run.directory"
    if not any(name.startswith(SCHEDULE) for name in changed):
        return f"{said}; they hold from step {step + 1} on"
    was, now = learning_rate(before.train, step), learning_rate(config.train, step + 1)
    return f"{said}; they hold from step {step + 1} on, where the learning rate goes from {was:.2e} to {now:.2e}"
