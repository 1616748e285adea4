"""From a Config to the layers of core's HybridStack: which module fills which symbol of the pattern."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from atlas_megatron.config import Config, layers_of
from atlas_megatron.mixers import MIXERS
from atlas_megatron.mixers.linears import MixerLinears
from atlas_megatron.model.experts import DrawnExperts
from atlas_megatron.parallel.world import own_stream

# Compute capability from which Transformer Engine has a recipe.
FP8_RECIPES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}

CORE_MIXER = "M"  # core's symbol of a Mamba layer


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight. Core's plain norm is torch's, which it refuses under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # Each rank sees its own tokens: core then sums this gradient over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class AtlasStack(HybridStack):
    """Core's stack with a final norm of our choice: core's own is always Transformer Engine's."""

    def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, norm: type, **placement: Any):
        super().__init__(config, submodules, post_layer_norm=False, **placement)
        if self.post_process:
            self.post_layer_norm = True
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


class Drawn:
    """Builds a layer of core's with a random stream of its own, by `run.seed` and the layer's number in the model."""

    def __new__(cls, kind: type, seed: int, layer_number: int, **slot: Any) -> Any:
        with own_stream(seed, f"layer {layer_number}"):
            return kind(layer_number=layer_number, **slot)


class MixerAt:
    """Builds the mixer that `model.pattern` names at a layer's number: core's pattern knows one symbol for all."""

    def __new__(cls, config: TransformerConfig, settings: Config, layer_number: int, **slot: Any) -> Any:
        mixer = MIXERS[layers_of(settings)[layer_number - 1]]
        return mixer(config, settings=settings, layer_number=layer_number, **slot)


def core_pattern(config: Config) -> str:
    """`model.pattern` in core's symbols: every mixer stands in the slot of core's Mamba."""
    return "".join(CORE_MIXER if symbol in MIXERS else symbol for symbol in config.model.pattern)


def stack_spec(config: Config) -> ModuleSpec:
    """The stack of `config`. Raises ValueError if it asks for Transformer Engine where there is none."""
    backend, norm = _backend(config)
    plain = LocalSpecProvider().column_parallel_linear()
    linears = MixerLinears(backend.column_parallel_linear(), backend.row_parallel_linear(), plain)
    mlp = MLPSubmodules(linear_fc1=linears.column_type, linear_fc2=linears.row_type)
    seed = config.run.seed
    layers = HybridStackSubmodules(
        mamba_layer=ModuleSpec(
            module=Drawn,
            params={"kind": MambaLayer, "seed": seed},
            submodules=MambaLayerSubmodules(
                norm=norm,
                mixer=ModuleSpec(module=MixerAt, params={"settings": config}, submodules=linears),
                mamba_bda=get_bias_dropout_add,
            ),
        ),
        mlp_layer=ModuleSpec(
            module=Drawn,
            params={"kind": MLPLayer, "seed": seed},
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=norm,
                mlp=partial(MLP.as_mlp_submodule, submodules=mlp),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
        moe_layer=ModuleSpec(
            module=DrawnExperts,
            params={"backend": backend, "norm": norm, "bda": get_bias_dropout_add, "seed": seed},
        ),
    )
    return ModuleSpec(module=AtlasStack, submodules=layers, params={"norm": norm})


def _backend(config: Config) -> tuple[BackendSpecProvider, type]:
    if not config.model.transformer_engine:
        return LocalSpecProvider(), RMSNorm
    # Imported only when asked for: the package is optional, and its modules cannot be built without a GPU.
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not (HAVE_TE and torch.cuda.is_available()):
        missing = "no GPU is visible" if HAVE_TE else "transformer-engine is not installed"
        raise ValueError(
            f"model.transformer_engine=true but {missing}; install the `gpu` extra on a machine with a GPU, "
            "or set model.transformer_engine=false"
        )
    _check_fp8(config)
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    backend = TESpecProvider()
    return backend, backend.layer_norm(rms_norm=True)


def _check_fp8(config: Config) -> None:
    """Raise ValueError if this GPU is too old for `train.fp8`."""
    if not config.train.fp8:
        return
    needed, found = FP8_RECIPES[config.train.fp8_recipe], torch.cuda.get_device_capability()
    if found < needed:
        raise ValueError(
            f"train.fp8={config.train.fp8!r} with fp8_recipe={config.train.fp8_recipe!r} needs a GPU of compute "
            f"capability {needed[0]}.{needed[1]}, this one has {found[0]}.{found[1]}; take another recipe, or "
            "train.fp8=''"
        )
