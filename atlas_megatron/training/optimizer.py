"""AdamW over Megatron-Core's distributed optimizer."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.transformer import MegatronModule, TransformerConfig

from atlas_megatron.config import Config
from atlas_megatron.training.schedule import build_schedule


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
    return optimizer, build_schedule(train, optimizer)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Of the gradients of all processes as they are now, before an update, which computes it again."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())
