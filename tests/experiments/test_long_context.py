"""The long-context experiment: a training that fails is a cell and a line of the text, and the others go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from experiments import long_context as experiment
from experiments.shared.record import Options, Record

GRID = replace(experiment.QUICK, contenders=("gated delta",))


def test_a_gradient_that_is_not_finite_leaves_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explodes(*arguments: Any) -> NoReturn:
        raise ArithmeticError("a gradient was not finite at step 3")

    monkeypatch.setattr(experiment, "_train", explodes)
    results = Record("long_context", Options(quick=True, out=tmp_path), {})
    name = experiment.trained_cell("gated delta", 1)
    results.cell(name, lambda: experiment.train("gated delta", 1, GRID, tmp_path))
    cell = results.cells[name]
    assert cell["wrong"] == "a gradient was not finite at step 3" and cell["seed"] == 1
    assert experiment.reads_of(results, "gated delta", 1, GRID) == []
    assert experiment.reads_of(results, "gated delta", 2, replace(GRID, seeds=(2,))) == [512, 2048]
    experiment.drop_lost(results, GRID, tmp_path)
    assert name in results.cells
    experiment.describe(results, GRID, ())
    assert "gated delta, seed 1: a gradient was not finite at step 3" in results.path.with_suffix(".md").read_text()


def test_beyond_a_length_the_first_seed_alone_reads() -> None:
    class Nothing:
        cells: dict[str, Any] = {}

    grid = experiment.FULL
    longest = max(grid.samples)
    assert longest > grid.all_seeds
    assert longest in experiment.reads_of(Nothing, "titans", grid.seeds[0], grid)  # type: ignore[arg-type]
    assert longest not in experiment.reads_of(Nothing, "titans", grid.seeds[1], grid)  # type: ignore[arg-type]
