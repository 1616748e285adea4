"""Core's mixture of experts, so drawn that it starts alike however many ranks share the experts out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder, MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from atlas_megatron.parallel.world import own_stream


class DrawnExperts:
    """Builds a layer of core's with experts: the router and the shared one draw from the layer's stream, each expert
    from a stream of its own, by `seed`, the layer's number in the model and the expert's in the layer."""

    def __new__(
        cls, backend: BackendSpecProvider, norm: type, bda: Callable, seed: int, layer_number: int, **slot: Any
    ) -> Any:
        linears = MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())
        part = f"layer {layer_number}"
        mixture = MoESubmodules(
            experts=partial(_experts, seed, part, backend),
            shared_experts=partial(SharedExpertMLP, submodules=linears),
        )
        submodules = TransformerLayerSubmodules(
            pre_mlp_layernorm=norm, mlp=partial(MoELayer, submodules=mixture), mlp_bda=bda
        )
        with own_stream(seed, part):
            return MoETransformerLayer(layer_number=layer_number, submodules=submodules, **slot)


def _experts(
    seed: int, part: str, backend: BackendSpecProvider, number: int, config: TransformerConfig, *,
    pg_collection: Any, name: str | None = None,
) -> MegatronModule:  # fmt: skip
    """A rank's experts: one after the other, or with Transformer Engine all in grouped products."""
    first = number * pg_collection.ep.rank()
    own = copy.copy(config)
    own.init_method = _InTurn(config.init_method, seed, f"{part} inputs of expert", first)
    own.output_layer_init_method = _InTurn(config.output_layer_init_method, seed, f"{part} output of expert", first)
    build: ExpertsBuilder = backend.grouped_mlp_modules(config.moe_grouped_gemm)
    experts = build(number, own, pg_collection=pg_collection, name=name)
    for parameter in experts.parameters():
        # Core marks them so where several ranks share them out. Always: the optimizer then has a part for experts in
        # every layout, and its checkpoints move.
        parameter.allreduce = False
    return experts


class _InTurn:
    """An initialisation that core calls once for each of a rank's experts, in their order."""

    def __init__(self, init: Callable[[Tensor], Any], seed: int, part: str, first: int) -> None:
        self.init, self.seed, self.matrices, self.next = init, seed, part, first

    def __call__(self, weight: Tensor) -> Any:
        with own_stream(self.seed, f"{self.matrices} {self.next}"):
            self.next += 1
            return self.init(weight)
