"""The same seed draws the same weights in every layout, to the bit: by the part of the model, not by the rank."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atlas_megatron.config import Config
from atlas_megatron.model.build import build_model
from tests.support.layouts import BASELINES, BASES, LAYOUTS, ONE, fits, other_starts, save_start
from tests.support.processes import run

STARTS = {"memory": BASES["memory"], "hybrid": BASES["hybrid"], "baselines": BASELINES}


SHORT = "memory"  # what `make test` tries
MARKED = [base if base == SHORT else pytest.param(base, marks=pytest.mark.parallel) for base in STARTS]


@pytest.mark.parametrize("base", MARKED)
def test_every_layout_starts_from_the_same_weights(tmp_path: Path, base: str) -> None:
    config = STARTS[base]
    run(1, save_start, {base: ONE.of(config)}, tmp_path)
    names = [name for name in LAYOUTS if fits(base, name)]
    for size, alike in groupby(names, key=lambda name: LAYOUTS[name].processes):
        tried = list(alike)
        cases = [(LAYOUTS[name].of(config), tmp_path / f"{base} start") for name in tried]
        for rank, others in enumerate(run(size, other_starts, cases)):
            assert dict(zip(tried, others, strict=True)) == {name: [] for name in tried}, f"rank {rank} of {size}"


def start(config: Config) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in build_model(config).named_parameters()}


@pytest.mark.usefixtures("single_process_megatron")
def test_a_start_is_the_seeds_alone() -> None:
    config = ONE.of(STARTS["memory"])
    torch.manual_seed(7)
    one = start(config)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn), "building a model moved torch's stream"
    assert all(torch.equal(value, one[name]) for name, value in start(config).items())
    other = start(replace(config, run=replace(config.run, seed=config.run.seed + 1)))
    # Gains, and biases of gates, are constants: of those each row is alike.
    drawn_ones = {name for name, value in one.items() if value.unique().numel() > value.shape[-1]}
    assert "embedding.word_embeddings.weight" in drawn_ones
    assert {name for name, value in other.items() if not torch.equal(value, one[name])} == drawn_ones


@pytest.mark.usefixtures("single_process_megatron")
def test_layers_of_one_kind_start_from_other_weights() -> None:
    """And the output layer's are not the embedding's."""
    config = STARTS["hybrid"]
    found = start(replace(config, model=replace(config.model, pattern="A-A-")))
    for name, value in found.items():
        if name.startswith("decoder.layers.0.") and "linear" in name:
            assert not torch.equal(value, found[name.replace("layers.0.", "layers.2.")]), name
    first, second = (found[f"decoder.layers.{layer}.mlp.linear_fc1.weight"] for layer in (1, 3))
    assert not torch.equal(first, second)
    assert not torch.equal(found["embedding.word_embeddings.weight"], found["output_layer.weight"])


@pytest.mark.usefixtures("single_process_megatron")
def test_a_layer_starts_alike_whatever_the_others_are() -> None:
    config = ONE.of(STARTS["memory"])
    one = start(config)
    other = start(replace(config, model=replace(config.model, pattern="*-*-M-")))
    for name in ("embedding.word_embeddings.weight", "decoder.layers.4.mixer.linear_qkvg.weight"):
        assert torch.equal(one[name], other[name]), name
