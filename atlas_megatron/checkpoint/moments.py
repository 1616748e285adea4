"""The moments of a distributed AdamW on their way out of a checkpoint and into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from atlas_megatron.config import Config


def allocate_moments(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW the moments of its first step now: core reads them before it loads a checkpoint into them."""
    for shard in _shards(optimizer):
        # Transformer Engine's and Apex's Adam keep no step count here; core allocates their moments itself.
        if isinstance(shard.optimizer, torch.optim.AdamW):
            for parameter in (p for group in shard.optimizer.param_groups for p in group["params"]):
                shard.optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def load_moments(optimizer: MegatronOptimizer, loaded: dict[str, Any], config: Config) -> None:
    """Take over a checkpoint's moments and step counts, under the settings of `config`, not the checkpoint's."""
    train = config.train
    betas = (train.adam_beta1, train.adam_beta2)
    # Before loading: core pairs saved groups with ours by their rates, among other things.
    for group in loaded["optimizer"]["param_groups"]:
        group.update(max_lr=train.lr, min_lr=train.min_lr, betas=betas, eps=train.adam_eps)
    moments = loaded.pop("param_state")
    optimizer.load_state_dict(loaded)
    for shard in _shards(optimizer):
        # Core looks for each parameter's step count among the moments, where it never saves one; and the count that it
        # has just set is one tensor for all parameters, which AdamW would advance once for each of them.
        steps = {p: state.pop("step") for p, state in shard.optimizer.state.items() if "step" in state}
        shard.load_parameter_state_from_fully_reshardable(moments)
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
    """The distributed optimizers inside core's chain of them."""
    return getattr(optimizer, "chained_optimizers", [optimizer])
