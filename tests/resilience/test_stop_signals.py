"""Ctrl-C: the first saves, the second stops; and what a start that fails leaves behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from atlas_megatron.checkpoint.checkpoint import folder_of
from atlas_megatron.config import load
from atlas_megatron.resilience import stop_signals as stopping
from atlas_megatron.resilience.stop_signals import StopSignals
from atlas_megatron.train import leaving_nothing_empty, main
from atlas_megatron.training import metrics
from tests.support import tiny_run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tiny_run.write(tmp_path)


def press_at(step: int, monkeypatch: pytest.MonkeyPatch, presses: int = 1) -> None:
    """Ctrl-C when a step's record is written."""
    write = metrics.RunLog.write

    def pressing(self: metrics.RunLog, record: metrics.Record) -> None:
        write(self, record)
        if record["step"] == step:
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(metrics.RunLog, "write", pressing)


def test_the_first_saves_and_says_the_step(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        press_at(1, patch)
        assert main([str(config), "checkpoint.every=100", "train.validate_every=0"]) == 0
    saved = folder_of(tmp_path / "run") / "step_00000002"
    out, err = capfd.readouterr()
    assert f"Ctrl-C: stopped after step 2, saved {saved}; the same command resumes there" in out
    assert "Ctrl-C: saves after the step in hand and stops; once more stops at once" in err
    assert "Ctrl-C: stopped after step 2" in (tmp_path / "run" / metrics.TEXT).read_text()
    assert main([str(config), "train.validate_every=0"]) == 0
    assert [record["step"] for record in metrics.read(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_the_second_stops_and_says_what_is_there(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stopping, "ONE_PRESS_SECONDS", -1.0)
    for step, left in ((1, "there is no checkpoint yet: the same command begins at step 1"), (4, "step_00000003")):
        with monkeypatch.context() as patch:
            press_at(step, patch, presses=2)
            assert main([str(config), "train.validate_every=0"]) == 130
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("atlas-train: interrupted; ") and said.endswith(left)


def test_one_press_that_comes_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopSignals() as signals:
        with pytest.raises(KeyboardInterrupt):  # nothing can be saved yet
            os.kill(os.getpid(), signal.SIGINT)
        signals.can_save = True
        for _ in range(2):  # the terminal's, and the launcher's that hands it on
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked == "Ctrl-C"
        monkeypatch.setattr(stopping, "ONE_PRESS_SECONDS", -1.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_process_that_ignores_it_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.asked == ""
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "words", [["data.train=nowhere"], ["train.warmup_steps=9"], ["data.tokenizer=nowhere"], ["model.vocab_size=3"]]
)
def test_a_failed_start_leaves_nothing(config: Path, tmp_path: Path, words: list[str]) -> None:
    there = sorted(tmp_path.rglob("*"))
    assert main([str(config), f"run.directory={tmp_path}/runs/deep/one", *words]) == 2
    assert sorted(tmp_path.rglob("*")) == there


def test_what_was_there_before_a_failed_start_stays(config: Path, tmp_path: Path) -> None:
    directory = tmp_path / "kept"
    directory.mkdir()
    for name, made in (("kept", "kept"), ("new/one", "new")):
        run = load(config, [f"run.directory={tmp_path}/{name}"])
        with pytest.raises(ValueError, match="fails"), leaving_nothing_empty(run):
            (tmp_path / name / "index").mkdir(parents=True)
            raise ValueError("fails")
        assert (tmp_path / made).exists() == (name == "kept")
    assert (directory / "index").is_dir()
