"""The experiment on memories that reset: contenders of one size, times to one loss, both stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from atlas_megatron.config import load
from atlas_megatron.config.checks import validate
from atlas_megatron.model.build import num_params
from experiments import tnt
from experiments.shared import record
from experiments.shared.protocol import Protocol
from tests.support import pages, tiny_run


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tiny_run.write(tmp_path, "M-M-")
    # One sequence of a whole shard: the training set has as many tokens, the validation set has not.
    said = {"global_batch = 4": "global_batch = 1", "micro_batch = 2": "micro_batch = 1", "/validation": "/train"}
    for old, new in said.items():
        base.write_text(base.read_text().replace(old, new))
    monkeypatch.setattr(tnt, "BASE", base)
    monkeypatch.setattr(tnt, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(tnt.recipe, "prepare_bytes", lambda: None)
    return tmp_path


@pytest.mark.parametrize("name", tnt.CONTENDERS)
def test_contenders_are_valid_and_of_one_size(name: str) -> None:
    comparison = Protocol(tnt.BASE, (), tnt.STEPS, (), (1,), tnt.RUNS)
    config = load(tnt.BASE, tnt.words_of(comparison, name, 1))
    validate(config, world_size=1)
    assert num_params(config) == pytest.approx(num_params(load(tnt.BASE, [])), rel=0.01)


def test_a_loss_is_reached_between_validations_or_never() -> None:
    cell = {"curve": [[25, 4.0], [50, 3.0], [75, 2.5]]}
    assert tnt.steps_to(cell, 3.25) == 43.75
    assert tnt.steps_to(cell, 2.5) == 75
    assert tnt.steps_to(cell, 2.4) is None and tnt.steps_to({"wrong": "overflow"}, 3.0) is None


def test_the_time_to_a_loss_is_of_steps_that_were_timed_apart(tmp_path: Path) -> None:
    results = record.Record("tnt", record.options("tnt", "", ["--out", str(tmp_path)], reports=True), {})
    curves = {1: [[25, 4.0], [50, 3.0]], 2: [[25, 4.0], [50, 2.0]], 3: [[25, 4.0], [50, 3.6]]}
    for seed, curve in curves.items():
        results.cells[f"tnt: TNT {{8}}, seed {seed}"] = {"curve": curve, "bits_per_byte": curve[-1][1]}
    assert tnt.time_to(results, "TNT {8}", (1, 2, 3), 3.0) is None
    for turn, seconds in ((1, [2.0, 2.1]), (2, [2.0, 9.0]), (3, [2.0, 2.0])):
        results.cells[f"time: TNT {{8}}, round {turn}"] = {"step_seconds": seconds}
    # The seeds reach three bits after 50 and 37.5 steps; the third never does.
    assert tnt.time_to(results, "TNT {8}", (1, 2, 3), 3.0) == pytest.approx(43.75 * 2.0)


@pytest.mark.slow
def test_quick_trains_both_stages_times_them_and_does_nothing_twice(
    tiny: Path, no_more_jobs: Callable[[], None]
) -> None:
    words = ["--quick", "--out", str(tiny / "out")]
    assert tnt.main(words) == 0
    cells = json.loads((tiny / "out/tnt.json").read_text())["cells"]
    assert {name.partition(":")[0] for name in cells} == {"tnt", "time"}
    assert len(cells) == 2 * len(tnt.QUICK) + 1
    assert not any("wrong" in cell for cell in cells.values())
    page = (tiny / "out/tnt.md").read_text()
    pages.hold(page)
    assert "stage 2 {2}" in page and "not trained yet" not in page
    assert (tiny / "out/tnt.png").read_bytes().startswith(b"\x89PNG")
    no_more_jobs()
    assert tnt.main(words) == 0
