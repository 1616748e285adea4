"""A mixer outside a stack, as its layer would build it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from atlas_megatron.config import Config
from atlas_megatron.parallel.device import device


def build_mixer(symbol: str, config: Config) -> Any:
    """The mixer of a layer with this symbol, in an initialised Megatron-Core."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from atlas_megatron.model.build import transformer_config
    from atlas_megatron.model.layer_specs import stack_spec

    config = replace(config, model=replace(config.model, pattern=symbol))
    layer = stack_spec(config).submodules.mamba_layer
    mixer = build_module(
        layer.submodules.mixer,
        transformer_config(config),
        d_model=config.model.hidden_size,
        layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        pp_layer_offset=0,
        name="mixer",
    )
    return mixer.to(device())
