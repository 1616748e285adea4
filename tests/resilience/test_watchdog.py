"""Hung steps end with stacks, one line and a status; what is slow by right does not; clocks may jump."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.parallel.world import RESUMES
from atlas_megatron.resilience import watchdog
from atlas_megatron.train import main
from atlas_megatron.training import metrics, trainer
from tests.support import tiny_run
from tests.support.faulty_process import forked

WORDS = ["checkpoint.every=2", "train.validate_every=0", "memory.ns_steps=1"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("watched"))


def hang(words: list[str], held: bool) -> None:
    """Train, and hang in the third step: asleep, or never letting go of the interpreter."""
    watchdog.LOOK_SECONDS = 0.1
    step = trainer.Trainer._step

    def third(self: trainer.Trainer, number: int) -> object:
        if number == 3:
            # As if the other minutes had gone by.
            self._watchdog._expect(0.5)
            stuck(held)
        return step(self, number)

    trainer.Trainer._step = third
    os._exit(main(words))


def stuck(held: bool) -> None:
    sys.setswitchinterval(1e6 if held else 0.005)
    while held:
        pass
    time.sleep(600)


@pytest.mark.parametrize(
    ("held", "status"),
    [
        pytest.param(False, watchdog.STATUS, id="asleep"),
        pytest.param(True, 1, id="interpreter held", marks=pytest.mark.parallel),
    ],
)
def test_a_hung_step_shows_its_stacks_and_ends(config: Path, tmp_path: Path, held: bool, status: int) -> None:
    words = [str(config), *WORDS, "resilience.hang_minutes=10", f"run.directory={tmp_path}/run"]
    ended = forked(hang, words, held, lines=tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert ended == status, said
    assert "in stuck" in said
    assert [path.name for path in checkpoint.folder_of(tmp_path / "run").iterdir()] == ["step_00000002"]
    if not held:
        (line,) = [line for line in said.splitlines() if line.startswith("atlas-train: ")]
        assert "rank 0 of 1 hung: no step was finished within resilience.hang_minutes=10;" in line
        assert line.endswith(RESUMES)


def test_what_is_slow_by_right_is_no_hang(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of the test's own: more than the limit in the first step, in validation and saving, then in a step."""
    clock, slow, ended = [0.0], [], []
    step, save, after = trainer.Trainer._step, checkpoint.Saver.save, trainer.Validation.after

    def wait(what: str) -> None:
        clock[0] += 61
        slow.append(what)
        time.sleep(0.5)  # the watchdog looks

    def stepping(self: trainer.Trainer, number: int) -> object:
        if number in (1, 4):
            wait(f"step {number}")
        return step(self, number)

    def saving(self: checkpoint.Saver, *given: object) -> Path:
        wait("save")
        return save(self, *given)

    def validating(self: trainer.Validation, number: int) -> metrics.Record:
        wait("validation")
        return after(self, number)

    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=time.sleep))
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(watchdog.Watchdog, "_end", lambda self: ended.append(list(slow)))
    monkeypatch.setattr(trainer.Trainer, "_step", stepping)
    monkeypatch.setattr(checkpoint.Saver, "save", saving)
    monkeypatch.setattr(trainer.Validation, "after", validating)
    words = ["resilience.hang_minutes=1", f"run.directory={tmp_path}/run", "checkpoint.every=3", "train.steps=4"]
    assert main([str(config), *words, "memory.ns_steps=1"]) == 0
    assert slow == ["step 1", "validation", "save", "step 4", "validation", "save"]
    assert ended == [["step 1", "validation", "save", "step 4"]]


def test_a_clock_that_jumps_changes_nothing(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two days back, two ahead, and right again, at every look."""
    wall, looks = time.time, []

    def jumping() -> float:
        looks.append(0)
        return wall() + 2 * 86400 * (len(looks) % 3 - 1)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    assert main([str(config), *WORDS, "resilience.hang_minutes=1", f"run.directory={tmp_path}/run"]) == 0
    records = metrics.read(tmp_path / "run")
    assert len(records) == 6 and looks
    for record in records:
        assert 0 < record["step_seconds"] < 60 and record["eta_seconds"] >= 0
