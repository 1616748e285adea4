"""AdamW over Megatron-Core's distributed optimizer, or core's Muon."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.transformer import MegatronModule, TransformerConfig

from atlas_megatron.config import Config
from atlas_megatron.config.layers import EXPERTS
from atlas_megatron.training import muon
from atlas_megatron.training.schedule import build_schedule


def takes_no_decay(parameter: torch.nn.Parameter) -> bool:
    """Norm gains, gates, start weights (marked by their module), and every bias."""
    return getattr(parameter, "no_weight_decay", False) or parameter.dim() <= 1


def wrap(
    chunk: MegatronModule, core: TransformerConfig, config: Config, *, first: bool = True
) -> DistributedDataParallel:
    """A model chunk with gradient buffers that data-parallel replicas reduce together.

    Raises ValueError where train.optimizer wants a package or a precision that is not there.
    """
    train = config.train
    options = DistributedDataParallelConfig(
        use_distributed_optimizer=train.optimizer == "adamw" or train.muon_layer_wise,
        # bfloat16 sums over many replicas lose the small gradients of gates and start weights.
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=torch.cuda.is_available(),
    )
    places = None
    if train.optimizer == "muon":
        muon.mark(chunk, config, bf16=core.bf16)
        places = muon.layout(chunk, options, first=first) if train.muon_layer_wise else None
    # The backward ends in a rank's first chunk: what the others reduce has its time to overlap, whole.
    return DistributedDataParallel(core, options, chunk, disable_bucketing=not first, full_param_layout=places)


def build_optimizer(
    config: Config, chunks: list[MegatronModule], *, bf16: bool
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """The optimizer of wrapped model chunks, and its schedule, which counts steps.

    With `bf16` the optimizer holds float32 master weights. Master weights and states are sharded over the data-parallel
    replicas, but for a Muon without train.muon_layer_wise.
    """
    train = config.train
    kind = {"optimizer": "adam", "use_distributed_optimizer": True}
    options = OptimizerConfig(
        **(kind if train.optimizer == "adamw" else muon.options(train)),
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )
    no_decay = ParamKey(predicate=ParamPredicate(name="no_weight_decay", fn=takes_no_decay))
    optimizer = get_megatron_optimizer(options, chunks, {no_decay: ParamGroupOverride(wd_mult=0.0)})
    if train.optimizer == "muon":
        muon.mark_masters(chunks)
    elif EXPERTS in config.model.pattern:
        # Of core's two parts, experts and all else, each would gather the parameters of both: the last does it once.
        for part in optimizer.chained_optimizers[:-1]:
            part._defer_param_sync = True
    return optimizer, build_schedule(train, optimizer)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Of the gradients of all processes as they are now, before an update, which computes it again."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())
