"""How many sequences a step has, and how many tokens a run, where `train.batch_ramp` lets the batch grow.

The ramp is written as Megatron's --step-batch-size-schedule, and core's calculator counts by it as the run goes. Here
it is read for checks and estimates, in closed form: no step is counted one by one.
"""

from __future__ import annotations

import re
from itertools import pairwise

from atlas_megatron.config.sections import Config

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
STAGE = re.compile(r"(\d{1,18})([KMBT]?):(\d{1,18})")
EXAMPLE = "'0:64 1B:128 4B:256'"


def schedule_of(config: Config) -> str:
    """The ramp in core's notation; of a run without one, its single batch."""
    return config.train.batch_ramp or f"0:{config.train.global_batch}"


def stages(config: Config) -> list[tuple[int, int]]:
    """Sequences trained on, and the sequences that a step has from there on.

    Raises ValueError where the ramp is of another form, does not rise in tokens, or does not end at
    train.global_batch.
    """
    said = f"train.batch_ramp={config.train.batch_ramp!r}"
    found = []
    for word in schedule_of(config).split():
        stage = STAGE.fullmatch(word)
        if not stage or not int(stage[3]):
            raise ValueError(f"{said}: {word!r} is no TOKENS:SEQUENCES; write the ramp as {EXAMPLE}")
        found.append((int(stage[1]) * UNITS[stage[2]] // config.model.seq_length, int(stage[3])))
    if not found or found[0][0] != 0:
        raise ValueError(f"{said} does not begin at token 0; write it as {EXAMPLE}")
    if any(later <= earlier for (earlier, _), (later, _) in pairwise(found)):
        raise ValueError(
            f"{said}: stages begin at sequences {', '.join(str(start) for start, _ in found)} of "
            f"model.seq_length={config.model.seq_length} tokens; let each begin a sequence later than the one before"
        )
    if found[-1][1] != config.train.global_batch:
        raise ValueError(
            f"{said} ends at {found[-1][1]} sequences, and train.global_batch is {config.train.global_batch}; set "
            f"train.global_batch={found[-1][1]}"
        )
    return found


def tokens_of(config: Config, steps: int, trained: int = 0) -> int:
    """Tokens of the next `steps` steps of a run that has trained on `trained` tokens."""
    length = config.model.seq_length
    first = now = trained // length
    ramp = stages(config)
    for (_, batch), (end, _) in pairwise(ramp):
        taken = min(steps, -(-max(0, end - now) // batch))
        now, steps = now + taken * batch, steps - taken
    return (now - first + steps * ramp[-1][1]) * length
