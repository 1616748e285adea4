"""What must hold of recomputation, and what of it Megatron-Core cannot do."""

from __future__ import annotations

from atlas_megatron.config.layers import CUT, LAYERS
from atlas_megatron.config.sections import Config

# Parts of core's layers that can be recomputed, and the symbols that have them. Mixers are not core's.
MODULES = {"mlp": "-", "moe": "E", "shared_experts": "E", "layernorm": "-E"}


def recomputed_layers(config: Config, stage: str) -> int:
    """How many layers of a pipeline stage are recomputed whole, from its first one on."""
    if not config.train.recompute:
        return 0
    return min(len(stage), config.train.recompute_layers or len(stage))


def forwards_again(config: Config, stage: str) -> str:
    """The layers of a pipeline stage whose products the backward computes a second time."""
    parts = "".join(MODULES[name] for name in ("mlp", "moe") if name in config.train.recompute_modules)
    return stage[: recomputed_layers(config, stage)] + "".join(symbol for symbol in stage if symbol in parts)


def check_depths(pattern: str) -> None:
    """Raise ValueError for the depths of multi-token prediction, which core writes behind `/`."""
    if "/" in pattern and "/" not in LAYERS:
        raise ValueError(
            f"model.pattern={pattern!r} asks by '/' for multi-token prediction, which is not built here: core "
            "numbers its layers from 1 again, and a mixer is found by its number in the model (docs/scale.md); leave "
            "'/' and what follows out"
        )


def check_recompute(config: Config) -> None:
    """Raise ValueError where more is to be recomputed than there is, or what core does not recompute."""
    train, pattern = config.train, config.model.pattern
    if train.recompute_layers and not train.recompute:
        raise ValueError(
            f"train.recompute_layers={train.recompute_layers} with train.recompute=false, which recomputes none; set "
            "train.recompute=true, or recompute_layers=0"
        )
    longest = max(len(stage) for stage in pattern.split(CUT))
    if train.recompute_layers > longest:
        raise ValueError(
            f"train.recompute_layers={train.recompute_layers}, but the longest stage of model.pattern={pattern!r} has "
            f"{longest} layers; give {longest} at most, or 0 for all"
        )
    _check_modules(config)


def _check_modules(config: Config) -> None:
    train, pattern, shared = config.train, config.model.pattern, config.experts.shared_ffn_hidden_size
    for name in train.recompute_modules:
        if name not in MODULES:
            raise ValueError(
                f"train.recompute_modules has {name!r}; use {', '.join(MODULES)}, or train.recompute=true for mixers"
            )
        if not set(MODULES[name]) & set(pattern):
            raise ValueError(
                f"train.recompute_modules has {name!r} but model.pattern={pattern!r} has no "
                f"{' or '.join(MODULES[name])} layer; leave it out"
            )
    if "shared_experts" in train.recompute_modules and ("moe" in train.recompute_modules or not shared):
        raise ValueError(
            "train.recompute_modules has 'shared_experts' "
            + ("beside 'moe', which holds them" if shared else "with experts.shared_ffn_hidden_size=0, which has none")
            + "; leave it out"
        )
    if train.recompute_modules and train.recompute:
        raise ValueError(
            f"train.recompute_modules={list(train.recompute_modules)} with train.recompute=true, which recomputes "
            "whole layers; set train.recompute=false, or recompute_modules=[]"
        )
    if "layernorm" in train.recompute_modules and not config.model.transformer_engine:
        raise ValueError(
            "train.recompute_modules has 'layernorm' with model.transformer_engine=false, without which core cannot "
            "recompute a norm; set model.transformer_engine=true (needs a GPU), or leave it out"
        )
    if "layernorm" in train.recompute_modules and train.fp8 and train.fp8_recipe == "delayed":
        raise ValueError(
            f"train.recompute_modules has 'layernorm' with train.fp8={train.fp8!r}, fp8_recipe='delayed', whose scales "
            "a second pass would move; take another recipe, or leave it out"
        )
