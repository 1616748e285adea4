"""A sweep of learning rates: its runs, what is refused before the first, and what it says came out."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot

from atlas_megatron.commands.sweep import main
from atlas_megatron.config import load
from atlas_megatron.scaling import sweep
from atlas_megatron.scaling.sweep import Outcome, means, points, sentences
from tests.support import tiny_run


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("tiny"))


def test_its_runs_differ_in_rate_seed_and_place(config: Path) -> None:
    base = load(config)
    runs = points(base, [6e-3, 1e-3, 6e-3], [2, 1])
    assert [(run.lr, run.seed) for run in runs] == [(1e-3, 1), (1e-3, 2), (6e-3, 1), (6e-3, 2)]
    assert runs[1].config.run.seed == 2 and runs[1].config.train.lr == 1e-3
    assert runs[0].config.train.min_lr == pytest.approx(1e-3 * base.train.min_lr / base.train.lr)
    assert [run.directory.name for run in runs[:2]] == ["lr_0.001_seed_1", "lr_0.001_seed_2"]
    assert {run.directory.parent for run in runs} == {Path(base.run.directory)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lr", "-0.001"], "train.lr=-0.001 must be greater than 0"),
        (["--lr", "1e-3", "fast"], "--lr 'fast' is no number; give some, as --lr 1e-3 3e-3"),
        (["--lr", "1e-3", "--seeds", "1.5"], "--seeds '1.5' is no number"),
        (["--lr", "inf"], "--lr inf is not finite"),
        (["--lr", "1e-3", "--jobs", "0"], "--jobs 0 is no number of runs"),
        (["--lr", "1e-3", "--seeds", "-1"], "run.seed=-1 is out of range"),
        (["--lr", "1e-3", "train.validate_every=0"], "rates are compared by their validation loss"),
        (["--lr", "1e-3", "data.train=nowhere"], "nowhere.idx does not exist"),
        (["--lr", "1e-3", "parallel.tensor=2"], "a world of 1 does not divide into parallel.tensor=2"),
    ],
)
def test_what_cannot_train_is_refused_before_the_first_run(
    config: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(config), f"run.directory={tmp_path}/sweep", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_what_was_found_is_said() -> None:
    clear = [Outcome(1e-3, 1, 3.0), Outcome(1e-3, 2, 3.1), Outcome(3e-3, 1, 2.0), Outcome(3e-3, 2, 2.1)]
    lost = [Outcome(1e-2, 1, None), Outcome(1e-2, 2, 1.0)]
    assert means([*clear, *lost]) == {1e-3: pytest.approx(3.05), 3e-3: pytest.approx(2.05), 1e-2: None}
    assert list(sentences([*clear, *lost])) == ["the best rate is 0.003: validation loss 2.0500"]
    assert list(sentences(clear))[1:] == ["it is the highest that was tried; try 0.006 too"]
    near = [Outcome(1e-3, 1, 2.0), Outcome(1e-3, 2, 2.4), Outcome(3e-3, 1, 2.3), Outcome(3e-3, 2, 2.3)]
    assert "no clear best" in list(sentences(near))[-1]
    assert list(sentences(lost)) == ["every rate met NaN or inf with some seed; try lower ones"]
    figure, axes = pyplot.subplots()
    sweep.draw(axes, [*clear, *lost])
    assert [len(line.get_xdata()) for line in axes.get_lines()] == [5, 2, 1]
    pyplot.close(figure)


@pytest.mark.slow
def test_a_sweep_trains_goes_on_and_says_what_came_out(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(config), f"run.directory={tmp_path}/sweep", "train.steps=4", "checkpoint.every=2"]
    rates = ["--lr", "1e-3", "3e-3", "--jobs", "2"]
    assert main([*words, *rates]) == 0
    said = capsys.readouterr().out
    assert "2 runs of 4 steps, 2 at a time" in said and "the best rate is" in said
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [run["lr"] for run in found["runs"]] == [1e-3, 3e-3] and all(run["loss"] > 0 for run in found["runs"])
    assert (tmp_path / "sweep" / "sweep.png").stat().st_size > 10_000
    # One is gone, the other is not trained again.
    shutil.rmtree(tmp_path / "sweep" / "lr_0.003_seed_1234")
    kept = (tmp_path / "sweep" / "lr_0.001_seed_1234" / "metrics.jsonl").stat().st_mtime_ns
    assert main([*words, *rates, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "lr_0.001_seed_1234: done" in said and "lr_0.003_seed_1234: to train" in said
    assert main([*words, *rates]) == 0
    assert (tmp_path / "sweep" / "lr_0.001_seed_1234" / "metrics.jsonl").stat().st_mtime_ns == kept
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"] == found["runs"]
    # With other keys its runs are not taken for the same.
    assert main([*words, "--lr", "1e-3", "train.clip_grad=0.5"]) == 2
    assert "lr_0.001_seed_1234 was trained with other keys: train.clip_grad=0.5 (was 1.0)" in capsys.readouterr().err


def test_a_rate_that_meets_nan_is_a_result(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'atlas-train: step 3: loss is nan' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert main([str(config), f"run.directory={tmp_path}/sweep", "--lr", "1e-3", "3e-3"]) == 0
    said = capsys.readouterr().out
    assert "lr 0.001, seed 1234: met NaN or inf" in said and "every rate met NaN or inf with some seed" in said
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [run["loss"] for run in found["runs"]] == [None, None]


def test_what_ends_a_run_ends_the_sweep_with_its_line(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    # 1 is also what Python ends with where it cannot import the project.
    for line, status in (("atlas-train: rank 1 is gone", 3), ("ModuleNotFoundError: No module", 1)):
        python.write_text(f"#!/bin/sh\necho '{line}' >&2\nexit {status}\n")
        python.chmod(0o755)
        assert main([str(config), f"run.directory={tmp_path}/sweep", "--lr", "1e-3", "3e-3"]) == 2
        said = capsys.readouterr().err
        assert f"lr_0.001_seed_1234: {line}; the same command goes on" in said and said.count("\n") == 1
        assert not (tmp_path / "sweep" / "sweep.json").exists()
