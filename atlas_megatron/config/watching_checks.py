"""What must hold between the keys by which a run is watched: evaluations and samples on the way, a profile."""

from __future__ import annotations

import re

from atlas_megatron.cli.options import lengths_of
from atlas_megatron.config.sections import Config


def check_watching(config: Config) -> None:
    """Raise ValueError where the keys of evaluations or of the profile contradict each other or the run's length."""
    train = config.train
    if train.evaluate_every and not train.evaluate_tasks:
        raise ValueError(
            f"train.evaluate_every={train.evaluate_every} with train.evaluate_tasks=[]; name tasks of atlas-eval, or "
            "set train.evaluate_every=0"
        )
    if 0 in evaluated_lengths(config):
        raise ValueError(
            f"train.evaluate_lengths={train.evaluate_lengths!r} names a length of 0 tokens; give 1 or more (perplexity "
            "is measured without context besides)"
        )
    profiled_steps(config)


def evaluated_lengths(config: Config) -> tuple[int, ...]:
    """Tokens of context and question of `train.evaluate_lengths`. Raises ValueError for another form."""
    if not config.train.evaluate_lengths:
        return (config.model.seq_length,)
    return lengths_of(config.train.evaluate_lengths, "train.evaluate_lengths")


def profiled_steps(config: Config) -> range:
    """The steps of `train.profile`; none where it is empty. Raises ValueError where there are no such steps."""
    given, steps = config.train.profile, config.train.steps
    if not given:
        return range(0)
    example = "for example 10:13, which are steps 10, 11 and 12"
    match = re.fullmatch(r"([0-9]{1,15}):([0-9]{1,15})", given)
    if not match:
        raise ValueError(f"train.profile={given!r} is no START:STOP; name two steps, {example}")
    start, stop = int(match[1]), int(match[2])
    if start < 1:
        raise ValueError(f"train.profile={given!r} begins before step 1, the first; write 1:{max(stop, 2)}")
    if stop <= start:
        raise ValueError(f"train.profile={given!r} holds no step: STOP must be above START, {example}")
    if stop > steps + 1:
        raise ValueError(
            f"train.profile={given!r} goes beyond the last step, train.steps={steps}; give a STOP of at most "
            f"{steps + 1}, or more steps"
        )
    return range(start, stop)
