"""Muon, as Megatron-Core has it: which parameters it moves, and how core is told.

Core's optimizer orthogonalises the momentum of each matrix by Newton-Schulz; `Costs.matrices` of the layers names them.
Everything else goes to the scalar optimizer. The package behind core's module is optional.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import emerging_optimizers
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.transformer.mlp import MLP
from torch import nn

from atlas_megatron.config import Config, TrainConfig
from atlas_megatron.mixers import MLP as MLPCosts
from atlas_megatron.mixers import Costs
from atlas_megatron.mixers.costs import Matrix

# A parameter with this attribute is Muon's; core's own mark routes it to a buffer of whole matrices.
MARK, ROUTED = "moved_by_muon", "is_managed_by_layer_wise_optimizer"
# What core reads of a weight that is several matrices.
PARTS = ("is_qkv", "qkv_split_shapes")
INSTALL = "pip install emerging-optimizers==0.3.0"


def wrong_here(train: TrainConfig, *, bf16: bool) -> str:
    """What keeps train.optimizer='muon' from running here, and what would do; empty where nothing does."""
    if not emerging_optimizers.HAVE_EMERGING_OPTIMIZERS:
        return (
            f"train.optimizer='muon' wants the package emerging-optimizers, which is not installed: {INSTALL}; or set "
            "train.optimizer='adamw'"
        )
    if train.muon_layer_wise and not bf16:
        return (
            "train.muon_layer_wise=true wants bfloat16 parameters, and train.precision='auto' is float32 without a "
            "GPU; set train.precision='bfloat16', or train.muon_layer_wise=false"
        )
    return ""


def mark(model: nn.Module, config: Config, *, bf16: bool) -> None:
    """Mark a model's matrices for Muon, before its gradient buffers are made. Raises ValueError for `wrong_here`."""
    wrong = wrong_here(config.train, bf16=bf16)
    if wrong:
        raise ValueError(wrong)
    for parameter in model.parameters():
        setattr(parameter, MARK, False)
    for module in model.modules():
        kind: type = MLPCosts if isinstance(module, MLP) else type(module)
        for matrix in kind.matrices(config) if issubclass(kind, Costs) else ():
            _mark(module.get_parameter(matrix.name), matrix)
    if config.train.muon_layer_wise:
        for parameter in model.parameters():
            setattr(parameter, ROUTED, getattr(parameter, MARK))


def _mark(parameter: nn.Parameter, matrix: Matrix) -> None:
    setattr(parameter, MARK, True)
    if matrix.heads:
        # A rank holds whole matrices of its heads: nothing is to be gathered.
        parameter.partition_dim = -1  # type: ignore[attr-defined]
    if matrix.parts:
        parameter.is_qkv, parameter.qkv_split_shapes = True, list(matrix.parts)  # type: ignore[attr-defined]


def layout(model: nn.Module, options: DistributedDataParallelConfig, *, first: bool) -> FullParamLayout:
    """Where a marked model's parameters lie in core's buffers, with train.muon_layer_wise: Muon's whole on one rank.

    first: the rank's first model chunk; the others have one bucket each.
    """
    replicas = parallel_state.get_data_parallel_world_size()
    # Buckets as core's own: larger for many replicas, and a single one where nothing overlaps with them.
    bucket = max(40_000_000, 1_000_000 * replicas) if options.overlap_grad_reduce else None
    if not first or parallel_state.get_pipeline_model_parallel_rank() > 0:
        bucket = None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return LayerWiseDistributedOptimizer.compute_full_param_layout(parameters, bucket, ranks, options)


def options(train: TrainConfig) -> dict[str, Any]:
    """What core's OptimizerConfig is told; the marked parameters are Muon's from here on, and no others."""
    entry = emerging_optimizers._EMERGING_OPTIMIZERS["muon"]
    rest = ParamKey(predicate=ParamPredicate(name="not marked for Muon", fn=_is_scalar))
    # Core's own rule takes every parameter of two dimensions, gates and gains among them.
    emerging_optimizers._EMERGING_OPTIMIZERS["muon"] = replace(
        entry, default_param_overrides={rest: {"optimizer": "adam"}}
    )
    precision = train.muon_fp32_matmul_prec
    if precision == "auto":
        precision = "medium" if torch.cuda.is_available() else "highest"
    return {
        "optimizer": "muon",
        "muon_momentum": train.muon_momentum,
        "muon_nesterov": train.muon_nesterov,
        "muon_coefficient_type": train.muon_coefficient_type,
        "muon_num_ns_steps": train.muon_num_ns_steps,
        "muon_scale_mode": train.muon_scale_mode,
        "muon_extra_scale_factor": train.muon_extra_scale_factor,
        "muon_split_qkv": train.muon_split_qkv,
        "muon_tp_mode": train.muon_tp_mode,
        "muon_fp32_matmul_prec": precision,
        "muon_scalar_optimizer": train.muon_scalar_optimizer,
        "use_distributed_optimizer": False,
        "use_layer_wise_distributed_optimizer": train.muon_layer_wise,
    }


def mark_masters(chunks: list[nn.Module]) -> None:
    """Repeat on float32 master weights which parts a matrix has: core copies how it is split, but not this."""
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        master = getattr(parameter, "main_param", None)
        for name in PARTS if master is not None and hasattr(parameter, PARTS[0]) else ():
            setattr(master, name, getattr(parameter, name))


def _is_scalar(parameter: torch.Tensor) -> bool:
    return not getattr(parameter, MARK, False)
