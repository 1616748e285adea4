"""Checkpoints: whole or absent, and a resumed run ends bit-equal with one that never stopped."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from pathlib import Path
from threading import Thread

import pytest
import torch

from atlas_megatron.checkpoint import checkpoint, shards
from atlas_megatron.config import Config
from atlas_megatron.parallel import world
from atlas_megatron.train import main
from atlas_megatron.training import metrics, trainer
from tests.support import tiny_run

STEPS = 6


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a config and of its run, trained without a stop, every second step saved."""
    root = tmp_path_factory.mktemp("unbroken")
    assert main([str(tiny_run.write(root)), "checkpoint.every=2"]) == 0
    return root


@pytest.fixture
def copied(unbroken: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The config and a copy of the unbroken run, to be damaged."""
    shutil.copytree(unbroken / "run", tmp_path / "run")
    return unbroken / "tiny.toml", tmp_path / "run"


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """The trained parameters of a run."""
    try:
        model, _ = checkpoint.load_model(run)
        return dict(model.named_parameters())
    finally:
        world.leave()


def assert_same_end(run: Path, other: Path) -> None:
    assert tiny_run.losses(run) == tiny_run.losses(other)
    assert metrics.read(run)[-1]["validation_loss"] == metrics.read(other)[-1]["validation_loss"]
    ours, theirs = parameters(run), parameters(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_rerun_is_bit_equal(unbroken: Path, tmp_path: Path) -> None:
    assert main([str(unbroken / "tiny.toml"), f"run.directory={tmp_path}/run"]) == 0
    assert_same_end(tmp_path / "run", unbroken / "run")


def saved_in(run: Path) -> list[str]:
    """The names of a run's checkpoints."""
    return sorted(path.name for path in checkpoint.folder_of(run).glob("step_*"))


@pytest.mark.parametrize("step", [2, 4])
def test_resuming_is_bit_equal(copied: tuple[Path, Path], unbroken: Path, step: int) -> None:
    config, run = copied
    for saved in checkpoint.folder_of(run).glob("step_*"):
        if int(saved.name.removeprefix("step_")) > step:
            shutil.rmtree(saved)
    assert main([str(config), f"run.directory={run}"]) == 0
    assert_same_end(run, unbroken / "run")


def test_saving_while_training_goes_on_saves_the_same(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(Thread):
        def run(self) -> None:
            time.sleep(1)  # several steps
            super().run()

    words = [str(unbroken / "tiny.toml"), f"run.directory={tmp_path}/run", "checkpoint.async_save=true"]
    with monkeypatch.context() as patch:
        patch.setattr(shards, "Thread", Late)
        assert main([*words, "checkpoint.every=4"]) == 0
    assert saved_in(tmp_path / "run") == ["step_00000004", "step_00000006"]
    assert_same_end(tmp_path / "run", unbroken / "run")
    shutil.rmtree(checkpoint.folder_of(tmp_path / "run") / "step_00000006")
    assert main(words) == 0
    assert_same_end(tmp_path / "run", unbroken / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_saves_and_the_same_command_goes_on(
    number: signal.Signals,
    unbroken: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = metrics.RunLog.write
    before = signal.getsignal(number)

    def interrupting(self: metrics.RunLog, record: metrics.Record) -> None:
        write(self, record)
        if record["step"] == 2:
            os.kill(os.getpid(), number)

    words = [str(unbroken / "tiny.toml"), f"run.directory={tmp_path}/run", "checkpoint.every=100"]
    with monkeypatch.context() as patch:
        patch.setattr(metrics.RunLog, "write", interrupting)
        assert main(words) == 0
    assert f"{number.name}: stopped after step 3" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    assert main(words) == 0
    assert "resumed from" in capsys.readouterr().out
    assert_same_end(tmp_path / "run", unbroken / "run")


def test_a_signal_that_comes_while_the_model_is_built_is_not_lost(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = trainer._build

    def interrupting(config: Config) -> checkpoint.TrainState:
        os.kill(os.getpid(), signal.SIGUSR1)
        return build(config)

    monkeypatch.setattr(trainer, "_build", interrupting)
    words = [str(unbroken / "tiny.toml"), f"run.directory={tmp_path}/run", "checkpoint.every=100"]
    assert main(words) == 0
    assert "SIGUSR1: stopped after step 1" in capsys.readouterr().out


def test_a_finished_run_says_so(copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, run = copied
    before = (run / metrics.METRICS).read_text()
    trained_with = (run / checkpoint.CONFIG).read_text()
    assert main([str(config), f"run.directory={run}", "train.lr=1e-2"]) == 0
    assert f"is done: step {STEPS} of {STEPS}" in capsys.readouterr().out
    assert (run / checkpoint.CONFIG).read_text() == trained_with
    assert (run / metrics.METRICS).read_text() == before


def test_a_longer_run_at_another_rate_goes_on(copied: tuple[Path, Path]) -> None:
    config, run = copied
    words = ["train.steps=7", "train.lr=1e-3", "train.global_batch=8"]
    assert main([str(config), f"run.directory={run}", *words]) == 0
    records = metrics.read(run)
    first, *_, before, last = (record["tokens"] for record in records)
    assert (before, last) == (STEPS * first, (STEPS + 2) * first)
    assert [record["step"] for record in records] == list(range(1, 8))
    assert records[-1]["lr"] == pytest.approx(1e-4)  # the end of the new schedule


def test_half_written_checkpoints_are_skipped_and_named(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = copied
    folder = checkpoint.folder_of(run)
    data = next((folder / "step_00000006").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    (folder / "step_00000004" / checkpoint.MARKER).unlink()
    (folder / "step_00000008.unfinished").mkdir()
    newest, skipped = checkpoint.latest(run)
    assert newest == folder / "step_00000002"
    assert [path.name for path in skipped] == ["step_00000008.unfinished", "step_00000006", "step_00000004"]
    assert main([str(config), f"run.directory={run}"]) == 0
    said = capsys.readouterr().out
    assert "skipped the half-written checkpoint" in said
    assert f"resumed from {newest}" in said


def test_a_checkpoint_of_another_model_is_refused(
    copied: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = copied
    before = saved_in(run)
    assert main([str(config), f"run.directory={run}", "memory.window=8", "model.ffn_hidden_size=64"]) == 2
    said = capsys.readouterr().err
    assert "memory.window: 8, the checkpoint has 4" in said
    assert "model.ffn_hidden_size: 64, the checkpoint has 48" in said
    assert said.count("\n") == 1
    assert saved_in(run) == before


@pytest.mark.parametrize("while_training", ["false", "true"])
def test_a_full_disk_leaves_what_was_saved(
    copied: tuple[Path, Path],
    unbroken: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    while_training: str,
) -> None:
    config, run = copied
    shutil.rmtree(checkpoint.folder_of(run) / "step_00000006")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main([str(config), f"run.directory={run}", f"checkpoint.async_save={while_training}"]) == 2
    said = capsys.readouterr().err
    assert "the checkpoint of step 6 was not saved" in said
    assert "make room there" in said
    assert said.count("\n") == 1
    assert saved_in(run) == ["step_00000002", "step_00000004"]
    assert main([str(config), f"run.directory={run}"]) == 0
    assert_same_end(run, unbroken / "run")


def test_a_checkpoint_stands_alone_and_old_ones_go(unbroken: Path, tmp_path: Path) -> None:
    words = [str(unbroken / "tiny.toml"), f"run.directory={tmp_path}/run", "checkpoint.every=1", "checkpoint.keep=2"]
    assert main(words) == 0
    kept = sorted(checkpoint.folder_of(tmp_path / "run").glob("step_*"))
    assert [path.name for path in kept] == ["step_00000005", "step_00000006"]
    marker = json.loads((kept[-1] / checkpoint.MARKER).read_text())
    assert marker["step"] == STEPS
    assert {"config.toml", "tokenizer.json", "tokenizer_config.json", "metadata.json"} <= marker["files"].keys()


def test_a_run_without_a_checkpoint_has_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        checkpoint.load_model(tmp_path)
