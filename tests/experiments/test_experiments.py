"""Each experiment is one command: numbers, picture and text come out, and what is done is not done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from atlas_kernels import initial_coefficients, lift
from experiments import capacity
from experiments.shared.record import Options, Record
from tests.support import pages

ROOT = Path(__file__).resolve().parents[2]


def quick(name: str, out: Path) -> str:
    """Run `name --quick` as a user would; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", "--quick", "--out", str(out)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "capacity",
        "start_recall",
        pytest.param("mqar", marks=pytest.mark.slow),
        pytest.param("mad", marks=pytest.mark.slow),
        pytest.param("long_context", marks=pytest.mark.slow),
        pytest.param("context_parallel", marks=pytest.mark.parallel),
    ],
)
def test_quick_run_leaves_results_and_a_second_one_leaves_them_alone(name: str, tmp_path: Path) -> None:
    printed = quick(name, tmp_path)
    stored = (tmp_path / f"{name}.json").read_text()
    content = json.loads(stored)
    assert {"command", "commit", "versions", "settings", "cells"} <= set(content)
    assert content["command"] == f"python -m experiments.{name} --quick"
    assert len(printed.splitlines()) == len(content["cells"]) > 3
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / f"{name}.md").read_text()
    assert content["command"] in page
    pages.hold(page)

    assert quick(name, tmp_path) == ""
    assert (tmp_path / f"{name}.json").read_text() == stored


def test_a_record_goes_on_where_it_stopped(tmp_path: Path) -> None:
    asked = Options(quick=True, out=tmp_path)
    Record("trial", asked, {"sizes": (1, 2)}).cell("one", lambda: {"found": 1})
    again = Record("trial", asked, {"sizes": (1, 2)})
    again.cell("one", lambda: pytest.fail("a finished cell ran again"))
    again.cell("two", lambda: {"found": 2})
    cells = Record("trial", asked, {"sizes": (1, 2)}).cells
    assert [cells[name]["found"] for name in ("one", "two")] == [1, 2]


def test_results_of_other_constants_are_not_mixed(tmp_path: Path) -> None:
    asked = Options(quick=True, out=tmp_path)
    Record("trial", asked, {"steps": 1, "seed": 0}).cell("one", lambda: {})
    with pytest.raises(ValueError, match=r"other constants \(steps\); move it away"):
        Record("trial", asked, {"steps": 2, "seed": 0})
    (tmp_path / "trial.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no results"):
        Record("trial", asked, {})


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_the_bound_of_a_linear_memory_is_the_rank_of_its_lifted_keys(degree: int) -> None:
    contender = next(c for c in capacity.CONTENDERS.values() if c.memory == "linear" and c.degree == degree)
    keys, _ = capacity.random_pairs(1000, (0,))
    keys = torch.nn.functional.normalize(keys.double(), dim=-1)
    if degree > 1:
        keys = lift(keys, "taylor", initial_coefficients("taylor", degree))
    assert int(torch.linalg.matrix_rank(keys[0, :, 0])) == contender.bound


def test_a_linear_memory_explains_its_share_of_random_values() -> None:
    contender = capacity.CONTENDERS["linear"]
    cell = capacity.measure(contender, 32)["last_pass"]
    assert sum(cell["explained"]) / 3 == pytest.approx(contender.bound / 32, abs=0.05)
