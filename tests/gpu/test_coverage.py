"""What users train on a GPU runs on its kernels: every shipped configuration of a GPU's size, every main preset."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atlas_kernels import check_implementation
from atlas_kernels.gpu import chain
from atlas_kernels.layer_start import weight_shapes
from atlas_megatron.config import load
from tests.support.device_problems import DEVICE

CONFIGS = Path(__file__).parents[2] / "configs"
FOR_GPUS = ["atlas-170m", "atlas-340m", "experiments/language_model_gpu", "scale/20m", "scale/1.3b", "scale/7b"]
PRESETS = ["atlas", "atlas++", "omeganet", "titans", "dla", "ttt"]


@pytest.mark.parametrize("config", FOR_GPUS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_kernels_cover(config, preset):
    memory = load(CONFIGS / f"{config}.toml", [f"memory.preset={preset}"]).memory
    weights = tuple(torch.empty(memory.heads, *shape, device=DEVICE) for shape in weight_shapes(memory))
    check_implementation("triton", memory.rule(), weights, torch.bfloat16)
    # As shipped those with Newton-Schulz write at most four times a chunk.
    assert chain.covers(memory.rule(), weights, torch.bfloat16) or not memory.rule().ns_steps
