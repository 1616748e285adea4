"""AdamW over Megatron-Core's distributed optimizer, with a linear warm-up and a cosine decay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.transformer import MegatronModule, TransformerConfig

from atlas_megatron.config import Config, TrainConfig


def takes_no_decay(parameter: torch.nn.Parameter) -> bool:
    """Norm gains, gates, start weights (marked by their module), and every bias."""
    return getattr(parameter, "no_weight_decay", False) or parameter.dim() <= 1


def wrap(chunk: MegatronModule, config: TransformerConfig, *, first: bool = True) -> DistributedDataParallel:
    """A model chunk with gradient buffers that data-parallel replicas reduce together."""
    options = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        # bfloat16 sums over many replicas lose the small gradients of gates and start weights.
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=torch.cuda.is_available(),
    )
    # The backward ends in a rank's first chunk: what the others reduce has its time to overlap, whole.
    return DistributedDataParallel(config, options, chunk, disable_bucketing=not first)


def build_optimizer(
    config: Config, chunks: list[MegatronModule], *, bf16: bool
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """The optimizer of wrapped model chunks, and its schedule, which counts steps.

    With `bf16` the optimizer holds float32 master weights, sharded over the data-parallel replicas.
    """
    train = config.train
    options = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
    )
    no_decay = ParamKey(predicate=ParamPredicate(name="no_weight_decay", fn=takes_no_decay))
    optimizer = get_megatron_optimizer(options, chunks, {no_decay: ParamGroupOverride(wd_mult=0.0)})
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.warmup_steps,
        lr_decay_steps=train.steps,
        lr_decay_style="cosine",
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=train.steps,
        wd_incr_style="constant",
        # The schedule is the configuration's, not the checkpoint's: a resumed run may be made longer.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler


def learning_rate(train: TrainConfig, step: int) -> float:
    """Of the update that step `step` makes, by the schedule above."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    if step > train.steps:
        return train.min_lr
    decayed = (step - train.warmup_steps) / (train.steps - train.warmup_steps)
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * decayed)) / 2


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Of the gradients of all processes as they are now, before an update, which computes it again."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


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
