"""The states of an optimizer on their way out of a checkpoint and into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer

from atlas_megatron.config import Config
from atlas_megatron.config.optimizer_checks import states_differences

# What a group of parameters has besides its settings.
COUNTED = ("params", "step")


def allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Give a sharded AdamW of torch's the moments of its first step now: core reads them before it loads into them."""
    for shard in _shards(optimizer):
        # Transformer Engine's and Apex's Adam keep no step count here; core allocates their moments itself.
        if isinstance(shard.optimizer, torch.optim.AdamW):
            for parameter in (p for group in shard.optimizer.param_groups for p in group["params"]):
                shard.optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def check_same_states(ours: Config, theirs: Config) -> None:
    """Raise ValueError where a checkpoint's optimizer keeps other states than ours, which then have none to go on from.
    """
    differences = states_differences(ours, theirs)
    if differences:
        raise ValueError(
            f"the checkpoint of {theirs.run.directory} holds another optimizer's states: {'; '.join(differences)}; set "
            "them as the checkpoint has them, or begin a new run from its weights (tools/convert_hf.py export, import)"
        )


def load_moments(optimizer: MegatronOptimizer, loaded: dict[str, Any], config: Config) -> None:
    """Take over a checkpoint's states and step counts, under the settings of `config`, not the checkpoint's."""
    chain = optimizer.chained_optimizers
    states = [loaded] if len(chain) == 1 else [state for _, state in sorted(loaded.items())]
    for state in states:
        for group in state.get("optimizer", state)["param_groups"]:
            # Before loading: core pairs saved groups with ours by their rates, among other things.
            group.update(max_lr=config.train.lr, min_lr=config.train.min_lr)
    moments = [state.pop("param_state", None) for state in states]
    settings = [{key: value for key, value in group.items() if key not in COUNTED} for group in optimizer.param_groups]
    optimizer.load_state_dict(loaded)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for shard, saved in zip(chain, moments, strict=True):
        if not isinstance(shard, DistributedOptimizer):
            continue
        # Core looks for each parameter's step count among the moments, where it never saves one; and the count that it
        # has just set is one tensor for all parameters, which AdamW would advance once for each of them.
        steps = {p: state.pop("step") for p, state in shard.optimizer.state.items() if "step" in state}
        shard.load_parameter_state_from_fully_reshardable(saved)
        for parameter, step in steps.items():
            shard.optimizer.state[parameter]["step"] = step.clone()


@contextmanager
def true_offsets(optimizer: MegatronOptimizer) -> Iterator[None]:
    """While a checkpoint is put together: parameters' places in core's gathered buffers as they really are.

    Core joins its buckets without the padding at their ends, then counts with it: behind the first padded bucket it
    would save other parameters' moments, silently.
    """
    buffers = [buffer for shard in _shards(optimizer) for buffer in shard.buffers]
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        starts = [0, *accumulate(bucket.numel_unpadded for bucket in buffer.buckets)]
        shifts = [start - bucket.offset for start, bucket in zip(starts, buffer.buckets, strict=False)]
        buffer.param_index_map = {
            parameter: (start + shifts[bucket], end + shifts[bucket], bucket)
            for parameter, (start, end, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, offsets in zip(buffers, padded, strict=True):
            buffer.param_index_map = offsets


def _shards(optimizer: MegatronOptimizer) -> list[Any]:
    """The distributed optimizers in core's chain; Muon's is none of them, sharded or not."""
    return [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]
