"""A Megatron model and the Hugging Face model with the same numbers."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from atlas_megatron.config import AttentionConfig, Config, DeltaConfig, MemoryConfig, RecurrentConfig
from atlas_megatron.hf.export import described
from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from atlas_megatron.hf.names import names_of
from tests.support.small_model import SMALL

BASE = replace(
    SMALL,
    attention=AttentionConfig(heads=4, head_dim=8, window=12, persistent=2, segment=8),
    recurrent=RecurrentConfig(heads=2, head_dim=8),
    delta=DeltaConfig(heads=2, head_dim=8, impl="chunked"),
)
# Without Newton-Schulz, which blows small directions of the momentum up, and their rounding with them.
CALM = {"preset": "omeganet", "window": 5, "chunk": 8}


def settings(pattern: str, *, tied: bool = True, **memory: Any) -> Config:
    """The small model with another pattern, and keys of its [memory] section."""
    from atlas_megatron.config.presets import PRESETS

    preset = PRESETS.get(memory.get("preset", ""), {})
    section = MemoryConfig(**{**asdict(BASE.memory), **preset, **memory})
    return replace(BASE, model=replace(BASE.model, pattern=pattern, tied_embeddings=tied), memory=section)


def moved(config: Config, dtype: torch.dtype = torch.float64, seed: int = 7) -> AtlasForCausalLM:
    """The Hugging Face model alone, every parameter moved away from where it starts."""
    torch.manual_seed(seed)
    model = AtlasForCausalLM(described(config)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def twins(config: Config, dtype: torch.dtype = torch.float64) -> tuple[Any, AtlasForCausalLM]:
    """Both, in evaluation mode, with every parameter moved away from where it starts. Needs a Megatron world."""
    from atlas_megatron.model.build import build_model

    model = build_model(config)
    model.config.params_dtype = dtype
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.to(dtype).parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    description = described(config)
    theirs = {name: value.detach().clone() for name, value in model.named_parameters()}
    ours = AtlasForCausalLM(description).to(dtype)
    wanted = {name for name, _ in ours.named_parameters()}
    given = {name.hf: theirs.pop(name.megatron) for name in names_of(description) if name.hf in wanted}
    assert not theirs, f"parameters without a name: {sorted(theirs)}"
    missing, unexpected = ours.load_state_dict(given, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model.eval(), ours.eval()


def tokens(batch: int = 2, length: int = 45, seed: int = 2) -> Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(seed))
