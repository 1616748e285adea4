"""The learning rate of every schedule, and what of a schedule is refused before the first step."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.config import Config, TrainConfig, load
from atlas_megatron.config.checks import validate
from atlas_megatron.train import main
from atlas_megatron.training import metrics
from atlas_megatron.training.resuming import changed_keys
from atlas_megatron.training.schedule import learning_rate
from tests.support import tiny_run

TRAIN = TrainConfig(steps=100, warmup_steps=10, lr=1e-3, min_lr=1e-4)


def falling(start: int, share: Callable[[float], float]) -> Callable[[int], float]:
    """From 1e-3 after step `start` to 1e-4 at step 100, by the share that is left of the way."""
    return lambda step: 1e-4 + 9e-4 * share(max(0, step - start) / (100 - start))


@pytest.mark.parametrize(
    ("words", "after"),
    [
        ({}, falling(10, lambda done: (1 + math.cos(math.pi * done)) / 2)),
        ({"schedule": "wsd", "decay_steps": 20}, falling(80, lambda done: 1 - done)),
        ({"schedule": "wsd", "decay_steps": 90, "decay_shape": "1-sqrt"}, falling(10, lambda done: 1 - done**0.5)),
        ({"schedule": "constant"}, lambda step: 1e-3),
        ({"schedule": "inverse_sqrt"}, lambda step: 1e-3 * (10 / step) ** 0.5),
        ({"schedule": "inverse_sqrt", "min_lr": 5e-4}, lambda step: max(5e-4, 1e-3 * (10 / step) ** 0.5)),
    ],
)
def test_each_schedule_after_its_warm_up(words: dict[str, object], after: Callable[[int], float]) -> None:
    train = replace(TRAIN, **words)
    validate(replace(Config(), train=train), 1)
    assert [learning_rate(train, step) for step in range(1, 11)] == pytest.approx([1e-4 * n for n in range(1, 11)])
    rates = [learning_rate(train, step) for step in range(11, 101)]
    assert rates == pytest.approx([after(step) for step in range(11, 101)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"schedule": "cosin"}, "train.schedule='cosin' is unknown; choose one of cosine, wsd, constant, inverse_sqrt"),
        ({"schedule": "wsd"}, "train.decay_steps=0; give from 1 to 90 steps, those after the warm-up, for example 18"),
        ({"schedule": "wsd", "decay_steps": 91}, "train.decay_steps=91; give from 1 to 90 steps"),
        ({"schedule": "wsd", "decay_steps": 9, "decay_shape": "sqrt"}, "train.decay_shape='sqrt' is unknown"),
        ({"decay_steps": 9}, "train.decay_steps=9 with train.schedule='cosine', which has no decay of its own"),
        ({"schedule": "constant", "decay_from": "a:3"}, "train.decay_from='a:3' with train.schedule='constant'"),
        ({"schedule": "inverse_sqrt", "warmup_steps": 0}, "train.warmup_steps=0, which is what its fall is measured"),
        ({"schedule": "wsd", "decay_steps": 20, "decay_from": "a:0"}, "train.decay_from='a:0' is no RUN:STEP"),
        ({"schedule": "wsd", "decay_steps": 20, "decay_from": "a"}, "train.decay_from='a' is no RUN:STEP"),
        ({"schedule": "wsd", "decay_steps": 20, "decay_from": "a:70"}, "train.steps=100; set train.steps=90"),
    ],
)
def test_what_does_not_fit_is_refused(words: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=r"^train\.") as refused:
        validate(replace(Config(), train=replace(TRAIN, **words)), 1)
    assert said in str(refused.value)


def test_another_schedule_from_here_on_is_said() -> None:
    before = replace(Config(), train=TRAIN)
    now = replace(before, train=replace(TRAIN, schedule="wsd", decay_steps=40))
    assert changed_keys(now, before, 40).endswith(
        'train.schedule="wsd" (was "cosine"), train.decay_steps=40 (was 0); they hold from step 41 on, where the '
        "learning rate goes from 7.75e-04 to 1.00e-03"
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("tiny")).parent


WSD = ["train.schedule=wsd", "train.decay_steps=3", "train.decay_shape=1-sqrt", "train.validate_every=0"]


def test_a_decaying_run_resumes_to_the_bit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(root / "tiny.toml"), *WSD]
    assert main([*words, f"run.directory={root}/whole"]) == 0
    shutil.copytree(root / "whole", root / "again")
    shutil.rmtree(checkpoint.folder_of(root / "again") / "step_00000006")
    assert main([*words, f"run.directory={root}/again"]) == 0
    whole, again = (metrics.read(root / name) for name in ("whole", "again"))
    assert [r["loss"] for r in again] == [r["loss"] for r in whole]
    train = load(root / "again" / "config.toml").train
    assert [r["lr"] for r in again] == [r["lr"] for r in whole]
    assert [r["lr"] for r in again] == pytest.approx([learning_rate(train, step) for step in range(1, 7)])
    assert again[-1]["lr"] == pytest.approx(train.min_lr)
    capsys.readouterr()
    # Its decay done, a longer run would rise again: that is said, before the step is taken.
    assert main([*words, f"run.directory={root}/again", "train.steps=7", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "0.003 after 2 steps" in said and "1-sqrt from step 4 to 0.0001" in said
    assert "resumed from" in said and "the learning rate goes from 1.00e-04 to 1.00e-04" in said


def test_data_of_another_order_are_refused_until_that_is_allowed(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(root / "tiny.toml"), f"run.directory={root}/seeds", "train.validate_every=0"]
    assert main([*words, "train.steps=3"]) == 0
    capsys.readouterr()
    other = [*words, "train.steps=4", "run.seed=5"]
    assert main(other) == 2
    said = capsys.readouterr().err
    assert "was trained with run.seed=1234, which is 5 now" in said and said.count("\n") == 1
    assert main([*other, "--dry-run"]) == 0
    assert "cannot train yet" in capsys.readouterr().out
    assert [record["step"] for record in metrics.read(root / "seeds")] == [1, 2, 3]
    assert main([*other, "data.allow_change=true"]) == 0
    assert "run.seed=5 (was 1234)" in capsys.readouterr().out


def test_another_batch_and_rate_hold_from_the_next_step_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(root / "tiny.toml"), f"run.directory={root}/changed", "train.validate_every=0"]
    assert main([*words, "train.steps=3"]) == 0
    capsys.readouterr()
    assert main([*words, "train.steps=5", "train.global_batch=8", "train.schedule=constant", "train.lr=2e-3"]) == 0
    said = capsys.readouterr().out
    changed = "train.steps=5 (was 3), train.global_batch=8 (was 4), train.lr=0.002 (was 0.003), train.schedule="
    assert changed in said and "where the learning rate goes from 1.00e-04 to 2.00e-03" in said
    assert said.index("these keys differ") < said.index("step 4/5")
    records = metrics.read(root / "changed")
    assert [record["tokens"] for record in records] == [128, 256, 384, 640, 896]
    assert [record["lr"] for record in records[3:]] == [2e-3, 2e-3]
