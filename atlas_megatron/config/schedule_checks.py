"""What must hold between the keys of the learning rate's schedule."""

from __future__ import annotations

from atlas_megatron.config.sections import TrainConfig


def check_schedule(train: TrainConfig) -> None:
    """Raise ValueError where the keys of the schedule contradict each other, or `train.decay_from`."""
    if train.min_lr > train.lr:
        raise ValueError(f"train.min_lr={train.min_lr} is above train.lr={train.lr}; lower it")
    if train.warmup_steps >= train.steps:
        raise ValueError(
            f"train.warmup_steps={train.warmup_steps} must be less than train.steps={train.steps}; set "
            f"train.warmup_steps={train.steps // 4}, or more steps"
        )
    if train.schedule == "inverse_sqrt" and not train.warmup_steps:
        raise ValueError(
            "train.schedule='inverse_sqrt' with train.warmup_steps=0, which is what its fall is measured by; set "
            f"train.warmup_steps={max(1, train.steps // 10)}"
        )
    _check_decay(train)


def branch(train: TrainConfig) -> tuple[str, int]:
    """Directory and step of `train.decay_from`. Raises ValueError where it is of another form."""
    directory, colon, step = train.decay_from.rpartition(":")
    # Python's isdigit takes digits of other scripts.
    if not (directory and colon and step.isascii() and step.isdigit() and len(step) <= 15 and int(step)):
        raise ValueError(
            f"train.decay_from={train.decay_from!r} is no RUN:STEP; name a run's directory and a step that it kept, "
            "for example runs/stable:4000"
        )
    return directory, int(step)


def _check_decay(train: TrainConfig) -> None:
    if train.schedule != "wsd":
        for key, given in (("decay_steps", train.decay_steps), ("decay_from", train.decay_from)):
            if given:
                raise ValueError(
                    f"train.{key}={given!r} with train.schedule={train.schedule!r}, which has no decay of its own; set "
                    "train.schedule='wsd', or leave it out"
                )
        return
    stable = train.steps - train.warmup_steps
    if not 0 < train.decay_steps <= stable:
        raise ValueError(
            f"train.schedule='wsd' with train.decay_steps={train.decay_steps}; give from 1 to {stable} steps, those "
            f"after the warm-up, for example {max(1, stable // 5)}"
        )
    if not train.decay_from:
        return
    if train.start_from:
        raise ValueError(
            f"train.decay_from={train.decay_from!r} with train.start_from={train.start_from!r}: one goes on from a "
            "checkpoint, the other begins anew with its weights; leave one out"
        )
    _, step = branch(train)
    if train.steps != step + train.decay_steps:
        raise ValueError(
            f"train.decay_from={train.decay_from!r} decays from step {step} on, over train.decay_steps="
            f"{train.decay_steps} steps, and train.steps={train.steps}; set train.steps={step + train.decay_steps}"
        )
