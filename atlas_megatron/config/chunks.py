"""A trained memory at another chunk: what changes with `memory.chunk`, and what stays as it was trained.

No parameter's shape hangs on the chunk, so any weights can be read with any. What a token writes must stay the same:

    eta's unit    eta = ETA_HEADROOM eta_start sigmoid(e). Without Newton-Schulz a derived eta_start follows from the
                  chunk. The trained one is therefore kept, as a number.
    ns_period     must divide the chunk. It stays where it does. Else it is the largest number that divides both.
    ns_step       "sum": a write takes the steps of the tokens that it stands for, so eta_start stays. "last": a write
                  takes one token's eta for the whole period. Where there are m / m' times as many writes, eta_start is
                  m' / m of the trained one.

Of a layer with local memories it is their chunks that change, as in TNT's second stage. Each word of memory.locals then
keeps the chunk that its step was trained at.

What is left is what the chunk means: from which weights gradients are taken, and after how many tokens they are new.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from atlas_kernels import MemoryRule
from atlas_kernels.layer_start import eta_start
from atlas_kernels.local_memories import locals_of
from atlas_megatron.config.differences import model_differences
from atlas_megatron.config.layers import uses
from atlas_megatron.config.sections import Config, MemoryConfig


def at_chunk(memory: MemoryConfig, chunk: int) -> MemoryConfig:
    """The section that reads a memory, trained as `memory` says, with gradients anchored every `chunk` tokens.

    With local memories: every one of them at that chunk, the layer's own as it is. Raises ValueError for a chunk below
    one token, one that does not divide a shard, and for a memory that has only one chunk.
    """
    if chunk < 1:
        raise ValueError(f"memory.chunk={chunk} must be at least 1 token")
    if memory.locals:
        return with_locals(memory, [chunk] * len(memory.locals))
    if chunk == memory.chunk:
        return memory
    if memory.kernel != "lifted":
        raise ValueError(
            f"memory.kernel={memory.kernel!r} keeps its sources and no matrices, and is read at its own chunk alone: "
            f"set memory.chunk={memory.chunk}"
        )
    if memory.rule().delta:
        raise ValueError(
            f"memory.chunk={chunk} of the delta rule, which is the rule of one token a chunk: the steps of more at one "
            "anchor would overshoot; set memory.chunk=1"
        )
    period = math.gcd(memory.ns_period, chunk)
    step = eta_start(memory)
    if memory.ns_steps and memory.ns_step == "last":
        step *= period / memory.ns_period
    read = replace(memory, chunk=chunk, ns_period=period, eta_start=step)
    read.rule()  # shards are whole chunks
    return read


def chunk_of(memory: MemoryConfig) -> int:
    """The chunk that `at_chunk` changes: the memory's, or the smallest of its local ones."""
    return min((local.chunk for local in locals_of(memory)), default=memory.chunk)


def with_locals(memory: MemoryConfig, chunks: Sequence[int]) -> MemoryConfig:
    """The section whose local memories, trained as `memory` says, have these chunks. Raises ValueError as the rule."""
    found = []
    for local, chunk in zip(locals_of(memory), chunks, strict=True):
        trained = f"/{local.trained}" if chunk != local.trained else ""
        found.append(f"{chunk}/{local.shard}{trained}")
    changed = replace(memory, locals=tuple(found))
    for local in locals_of(changed):
        MemoryRule.of(local)
    return changed


def continued(config: Config, before: Config) -> Config:
    """`config` for a run that begins with the weights of one of `before`: its memory steps as the weights were trained.

    memory.chunk, or the chunks of local memories, may be others; memory.eta_start=0 takes the trained one. Raises
    ValueError naming every other key in which the two are different models.
    """
    if not uses(config.model.pattern, "memory"):
        _refuse(model_differences(config, before), "")
        return config
    if before.memory.locals:
        ours, theirs = locals_of(config.memory), locals_of(before.memory)
        trained = before.memory
        if [local.shard for local in ours] == [local.shard for local in theirs]:
            trained = with_locals(trained, [local.chunk for local in ours])
            config = replace(config, memory=replace(config.memory, locals=trained.locals))
    else:
        trained = at_chunk(before.memory, config.memory.chunk)
    if config.memory.eta_start == 0 and not before.memory.locals:
        config = replace(config, memory=replace(config.memory, eta_start=trained.eta_start))
    at = "" if trained.chunk == before.memory.chunk else f", at memory.chunk={trained.chunk}"
    _refuse(model_differences(config, replace(before, memory=trained)), at)
    return config


def as_trained(config: Config, before: Config) -> Config:
    """`config` for a run that goes on from a checkpoint of `before`, at its chunks, with the steps that it was trained
    with: those that a second stage took over are not derived again. All else stays."""
    memory, trained = config.memory, before.memory
    if not uses(config.model.pattern, "memory") or memory.chunk != trained.chunk:
        return config
    ours, theirs = ([(local.chunk, local.shard) for local in locals_of(m)] for m in (memory, trained))
    step = memory.eta_start or trained.eta_start
    words = trained.locals if ours == theirs else memory.locals
    return replace(config, memory=replace(memory, eta_start=step, locals=words))


def _refuse(found: list[str], at: str) -> None:
    if not found:
        return
    more = "; memory.eta_start=0 takes the trained one" if any("memory.eta_start" in line for line in found) else ""
    raise ValueError(
        f"it is another model: {'; '.join(found)}; set them as the checkpoint has them{at}{more}, or begin without its "
        "weights"
    )


def said(before: MemoryConfig, after: MemoryConfig) -> str:
    """What another chunk changes, in words; empty where it is the same."""
    if before.locals != after.locals:
        return f"memory.locals={', '.join(after.locals)} (was {', '.join(before.locals)})"
    if before.chunk == after.chunk:
        return ""
    period = f", ns_period={after.ns_period} (was {before.ns_period})" if after.ns_period != before.ns_period else ""
    step = eta_start(before)
    stays = "stays" if after.eta_start == step else f"was {step:.4g}"
    return f"memory.chunk={after.chunk} (was {before.chunk}){period}, eta_start={after.eta_start:.4g} ({stays})"
