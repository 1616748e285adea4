"""The ladder: every rung has its size, is valid, fits its devices, and is what its formulas say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from atlas_megatron.config import load
from atlas_megatron.config.checks import validate
from atlas_megatron.estimate.dry_run import DryRun
from atlas_megatron.model.build import num_params
from atlas_megatron.scaling import ladder

SCALE = Path(__file__).parents[2] / "configs" / "scale"


@pytest.mark.parametrize("name", ladder.RUNGS)
def test_every_rung_is_of_its_size_and_passes_its_dry_run(name: str) -> None:
    setting = ladder.RUNGS[name]
    config = load(SCALE / f"{name.lower()}.toml")
    assert ladder.counted(config, setting) == pytest.approx(ladder.size_of(name), rel=0.05)
    devices = ladder.nodes_of(name) * max(1, setting.gpus_per_node)
    validate(config, devices)
    run = DryRun(config, devices, setting.memory, bf16=setting.precision == "bfloat16")
    assert run.verdict()[0].startswith("fits: ")
    model, train = config.model, config.train
    assert model.hidden_size == config.memory.heads * config.memory.head_dim
    assert 1 <= model.ffn_hidden_size / model.hidden_size <= 6
    tokens = train.steps * train.global_batch * model.seq_length
    assert tokens == pytest.approx(20 * ladder.size_of(name), rel=0.01)


def test_the_lines_pass_through_table_7() -> None:
    for row in ladder.TABLE_7:
        assert ladder.learning_rate(row.size) == pytest.approx(row.lr, rel=0.35)
        assert ladder.width_to_depth(row.size) == pytest.approx(row.width / row.depth, rel=0.45)
    # What the module's head says of them.
    assert ladder.learning_rate(0.49e9) == pytest.approx(1.4e-3, rel=0.05)
    assert ladder.width_to_depth(0.49e9) == pytest.approx(67, rel=0.02)
    for formula, power in ((ladder.learning_rate, -0.65), (ladder.width_to_depth, 0.30)):
        assert math.log10(formula(10e9) / formula(1e9)) == pytest.approx(power, abs=0.03)
    smallest = ladder.TABLE_7[0].size
    assert ladder.learning_rate(1e5) == ladder.learning_rate(smallest) < 3.1e-3


def test_batches_grow_with_the_root_of_the_tokens() -> None:
    assert ladder.batch_sequences(15e9, 4096) == 128
    assert ladder.batch_sequences(4 * 15e9, 4096) == 256
    assert ladder.batch_sequences(1e4, 512) == 4


def test_another_mixer_gets_the_rungs_shape_and_parameters() -> None:
    memory, attention = ladder.rung("20M"), ladder.rung("20M", symbol="F")
    assert attention.model.pattern == memory.model.pattern.replace("M", "F")
    assert attention.model.hidden_size == memory.model.hidden_size
    assert num_params(attention) == pytest.approx(num_params(memory), rel=0.02)
    assert attention.train.steps == memory.train.steps and attention.train.lr == memory.train.lr


@pytest.mark.parametrize(
    ("name", "nearest"), [("350M", "340M"), ("1B", "1.3B"), ("13b", "7B"), ("seven", ""), ("0M", ""), ("", "")]
)
def test_an_unknown_rung_names_the_nearest(name: str, nearest: str) -> None:
    near = f"the nearest is {nearest}; " if nearest else ""
    with pytest.raises(ValueError, match=f"is no rung; {near}rungs: 0.15M, "):
        ladder.named(name)
    assert ladder.named("1.3b") == "1.3B"


def test_a_smaller_device_gets_another_layout_or_a_refusal() -> None:
    roomy = ladder.rung("1.3B")
    tight = ladder.rung("1.3B", setting=replace(ladder.GPU, memory=24 * 2**30))
    assert (tight.train.micro_batch, tight.parallel.tensor) != (roomy.train.micro_batch, roomy.parallel.tensor)
    assert DryRun(tight, 16, 24 * 2**30, bf16=True).verdict()[0].startswith("fits: ")
    with pytest.raises(ValueError, match=r"rung 7B does not fit 64 devices of 4 GiB: at its leanest .* smaller rung"):
        ladder.rung("7B", setting=replace(ladder.GPU, memory=4 * 2**30))
    with pytest.raises(ValueError, match="0 tokens a parameter must be above 0"):
        ladder.rung("20M", tokens_per_parameter=0)
