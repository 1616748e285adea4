"""Where a run begins, which keys may change when it goes on, and what it says of those that did.

Model and tokenizer stay; sequences may grow. The order of the data stays (run.seed), unless data.allow_change takes
another one. Where a decay branches off stays. Steps, rates, batches, optimizer's numbers and layout may change.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from atlas_megatron.checkpoint import branching, checkpoint, step_folders
from atlas_megatron.config import Config, load_saved, uses
from atlas_megatron.config.chunks import as_trained
from atlas_megatron.config.differences import differences
from atlas_megatron.training import start_from
from atlas_megatron.training.schedule import learning_rate

# What the schedule is made of.
SCHEDULE = (
    "train.lr=", "train.min_lr=", "train.steps=", "train.warmup_steps=", "train.schedule=", "train.decay_steps=",
    "train.decay_shape=",
)  # fmt: skip
# Beyond the length of training gradients of a memory end after this part of it, as an exported model's do.
PARTS = 4


class Start(NamedTuple):
    """Where a run begins."""

    folder: Path | None  # the checkpoint that it goes on from, of its own or of the run that it branches off
    wrong: list[str]  # lines on damaged ones that were passed over
    before: Config  # what that, or the weights, were trained with; the run's own where there is neither
    config: Config  # the run's, with the memory's step as it was trained
    weights: Path | None = None  # the checkpoint whose weights it begins with


def start_of(config: Config) -> Start:
    """Every process of the world calls it, before it builds anything. Raises ValueError where the run cannot go on."""
    folder, wrong = checkpoint.to_resume(config.run.directory)
    if folder is None and config.train.start_from:
        return _begun(config, start_from.origin(config), wrong)
    if folder is None and config.train.decay_from:
        folder = branching.undamaged(config)
    return _checked(config, folder, wrong)


def start_seen(config: Config) -> Start:
    """As `start_of`, from markers alone and without a world."""
    folder, _ = checkpoint.latest(config.run.directory)
    if folder is None and config.train.start_from:
        source = checkpoint.latest(Path(config.train.start_from))[0]
        return _begun(config, source or start_from.origin(config), [])
    if folder is None and config.train.decay_from:
        folder = branching.kept(config)
    return _checked(config, folder, [])


def _begun(config: Config, source: Path, wrong: list[str]) -> Start:
    before, config = load_saved(source / checkpoint.CONFIG), start_from.begun(config, source)
    start_from.check_tokenizer(config, source)
    return Start(None, wrong, before, config, source)


def _checked(config: Config, folder: Path | None, wrong: list[str]) -> Start:
    if folder is None:
        return Start(None, wrong, config, config)
    before, step = load_saved(folder / checkpoint.CONFIG), step_folders.step_of(folder)
    own = folder.parent == checkpoint.folder_of(config.run.directory)
    if own:
        config = start_from.resumed(config, before)
    config = as_trained(config, before)
    checkpoint.check_same_model(folder, config)
    if not step:
        return Start(folder, wrong, before, config)
    checkpoint.check_same_states(config, before)
    ours, theirs = config.train, before.train
    if own and ours.decay_from != theirs.decay_from:
        raise ValueError(
            f"{folder} was trained with train.decay_from={theirs.decay_from!r}, which is {ours.decay_from!r} now; set "
            "it as it was, or choose another run.directory"
        )
    rate = learning_rate(theirs, step)
    if not own and not math.isclose(rate, ours.lr, rel_tol=1e-6):
        raise ValueError(
            f"train.decay_from={ours.decay_from!r}: the learning rate was {rate:g} at that step, and would jump to "
            f"train.lr={ours.lr:g}; set train.lr={rate!r}, or take a step at which it was {ours.lr:g}"
        )
    if config.run.seed != before.run.seed and not config.data.allow_change:
        raise ValueError(
            f"{folder} was trained with run.seed={before.run.seed}, which is {config.run.seed} now: data would come in "
            f"another order, some of it twice; set run.seed={before.run.seed}, choose another run.directory, or set "
            "data.allow_change=true"
        )
    return Start(folder, wrong, before, config)


def going_on(config: Config, before: Config) -> Config:
    """The configuration that a run goes on with from a checkpoint of `before`.

    Where its sequences grow, or once grew, and train.gradient_reach is not given, gradients of memories end by the
    length that it began with: of a memory without Newton-Schulz they explode at eight times that length.
    """
    if config.train.gradient_reach or not uses(config.model.pattern, "memory") or config.memory.kernel != "lifted":
        return config
    reach, chunk = before.train.gradient_reach, config.memory.chunk
    if not reach and config.model.seq_length > before.model.seq_length:
        reach = max(1, before.model.seq_length // PARTS)
    if reach:
        reach = max(1, reach // chunk) * chunk
    return replace(config, train=replace(config.train, gradient_reach=reach)) if reach else config


def samples_as_long(config: Config, before: Config, consumed: int) -> int:
    """How many of our sequences hold as many tokens as so many of a run's before."""
    return -(-consumed * before.model.seq_length // config.model.seq_length)


def said_of(start: Start, config: Config, step: int) -> list[str]:
    """What a run says before its first step, which is the one after `step`."""
    said = list(start.wrong)
    if start.folder:
        own = start.folder.parent == checkpoint.folder_of(config.run.directory)
        said.append(f"{'resumed from' if own else 'the decay branches off'} {start.folder}")
    if start.weights:
        said.append(start_from.line(start.weights, config))
    said += [changed_keys(config, start.before, step), longer_sequences(config, start.before, step)]
    return [line for line in said if line]


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


def longer_sequences(config: Config, before: Config, step: int) -> str:
    """One line where a run goes on with longer sequences than its checkpoint's; empty where it does not."""
    ours, theirs = config.model.seq_length, before.model.seq_length
    if ours <= theirs or step >= config.train.steps:
        return ""
    tokens = config.train.global_batch * ours
    said = [f"sequences grow from {theirs:,} to {ours:,} tokens, and a step reads {tokens:,}"]
    if uses(config.model.pattern, "memory"):
        said.append("retention is in the weights and stays what it was, derived from the first length or learned")
        reach = config.train.gradient_reach
        if config.memory.kernel == "lifted" and reach < ours:
            said.append(f"gradients of memories end every {reach:,} tokens (train.gradient_reach={ours} for none)")
    if step:
        said.append("texts are cut anew, so that some are read again; losses of before are of shorter contexts")
    return "; ".join(said)
