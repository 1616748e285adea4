"""What a run says when it goes on with other keys than it had, and what follows where its sequences grow."""

from __future__ import annotations

from dataclasses import replace

from atlas_megatron.config import Config, uses
from atlas_megatron.config.differences import differences
from atlas_megatron.training.optimizer import learning_rate

# What the schedule is made of.
SCHEDULE = ("train.lr=", "train.min_lr=", "train.steps=", "train.warmup_steps=")
# Beyond the length of training gradients of a memory end after this part of it, as an exported model's do.
PARTS = 4


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
