"""The recipe search: rows that are valid and of one size, failures that are rows, cells that are kept."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atlas_megatron.config import load
from atlas_megatron.config.checks import validate
from atlas_megatron.model.build import num_params
from atlas_megatron.training.trainer import Trainer
from experiments import recipe
from experiments.recipe_rows import SCREEN
from experiments.shared import protocol
from experiments.shared import trials as trials
from tests.support import pages, tiny_run


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recipe, "BASE", tiny_run.write(tmp_path, "M-M-"))
    monkeypatch.setattr(recipe, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(recipe, "prepare_bytes", lambda: None)
    return tmp_path


def test_every_row_is_valid_asks_something_and_has_the_first_ones_parameters() -> None:
    of = protocol.Protocol(recipe.BASE, (), 100, (), (1,), recipe.RUNS)
    first = next(iter(SCREEN.values()))
    wanted = num_params(load(recipe.BASE, of.words_of(first, first, 100, 1, None)))
    for name, row in SCREEN.items():
        config = load(recipe.BASE, of.words_of(row, first, 100, 1, None))
        validate(config, world_size=1)
        assert row.asks and num_params(config) == pytest.approx(wanted, rel=0.01), name


def test_every_trial_is_known_and_tried() -> None:
    named = {part for row in SCREEN.values() if row.trial for part in row.trial.split(" + ")}
    assert named == (set(trials.WRITERS) | set(trials.PATCHES))


def test_quick_leaves_a_table_and_does_nothing_twice(tiny: Path, no_more_jobs: Callable[[], None]) -> None:
    words = ["--quick", "--out", str(tiny / "out")]
    assert recipe.main(words) == 0
    cells = json.loads((tiny / "out" / "recipe.json").read_text())["cells"]
    assert set(cells) == {protocol.seed_cell(recipe.STAGE, name, 1) for name in recipe.QUICK}
    text = (tiny / "out" / "recipe.md").read_text()
    pages.hold(text)
    assert all(f"| {name} |" in text for name in recipe.QUICK) and "asks" in text
    assert (tiny / "out" / "recipe.png").read_bytes().startswith(b"\x89PNG")
    no_more_jobs()
    assert recipe.main(words) == 0


def test_a_run_whose_first_step_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(words: list[str], directory: Path) -> int:
        directory.mkdir()
        (directory / "metrics.jsonl").touch()
        (directory / "log.txt").write_text("atlas-train: step 1: loss is nan\n")
        return 1

    monkeypatch.setattr(protocol.record, "train_quietly", fails)
    cell = protocol.trained(tiny_run.write(tmp_path), [], tmp_path / "failed")
    assert cell["wrong"] == "status 1: atlas-train: step 1: loss is nan" and cell["bits_per_byte"] is None


def test_its_bytes_are_made_anew_where_python_was_updated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{number}.py" for number in range(40)]
    for file in files:
        file.write_text(f"number = {file.stem}\n" * 9)
    base, folder = tmp_path / "base.toml", tmp_path / "bytes"
    base.write_text(f'[data]\ntrain = ["{folder}/train"]\n')
    monkeypatch.setattr(recipe, "BASE", base)
    monkeypatch.setattr(recipe, "HELD_OUT", 0.3)
    monkeypatch.setattr(recipe, "standard_library", lambda _: files)
    recipe.prepare_bytes()
    first = (folder / "data.json").read_text()
    files[0].write_text("another = 1\n")
    recipe.prepare_bytes()
    second = (folder / "data.json").read_text()
    assert first != second
    # Of another vocabulary, they are not its own.
    monkeypatch.setattr(recipe, "BYTES", 260)
    with pytest.raises(ValueError, match="prepared from other inputs or with other settings"):
        recipe.prepare_bytes()
    assert (folder / "data.json").read_text() == second


def test_a_run_that_meets_nan_is_a_row(tiny: Path) -> None:
    """And what the configuration refuses; the cells beside it stay."""
    base = recipe.BASE
    words = ["train.steps=4", "train.warmup_steps=1", "train.validate_every=4", "checkpoint.every=4"]
    wild = protocol.trained(base, [*words, "train.lr=1e30", "train.clip_grad=0"], tiny / "wild")
    assert wild["bits_per_byte"] is None and wild["wrong"].startswith("status 1: ")
    assert "loss is nan, first seen in output of layer 1 (memory)" in wild["wrong"]
    refused = protocol.trained(base, [*words, "memory.theta_start=1.5"], tiny / "refused")
    assert refused["bits_per_byte"] is None and "theta_start=1.5 must lie between" in refused["wrong"]


def test_a_run_that_was_stopped_is_no_cell_and_goes_on(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train.steps=4", "train.warmup_steps=1", "train.validate_every=4", "checkpoint.every=2"]
    whole = protocol.trained(recipe.BASE, words, tiny / "whole")

    step_of = Trainer._step

    def stopped(self: Trainer, step: int) -> Any:
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return step_of(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", stopped)
        with pytest.raises(ValueError, match="was stopped at step 2; the same command goes on"):
            protocol.trained(recipe.BASE, words, tiny / "stopped")
    assert protocol.trained(recipe.BASE, words, tiny / "stopped")["bits_per_byte"] == whole["bits_per_byte"]


def test_signs_and_rates() -> None:
    assert protocol.apart([1.0, 2.0], [1.5, 2.5]) == (0.5, "every seed")
    assert protocol.apart([1.0, 2.0], [1.5, 1.5]) == (0.0, "seeds disagree")
    assert protocol.apart([1.0, None], [None, 2.0]) is None
