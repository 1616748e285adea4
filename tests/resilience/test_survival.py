"""Runs that survive: what is injected costs the steps since the last checkpoint, and nothing else."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.files import integrity
from atlas_megatron.resilience import run_lock
from atlas_megatron.train import main
from atlas_megatron.training import metrics, trainer
from tests.support import tiny_run
from tests.support.faulty_process import forked


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a config, and of the run of it that nothing disturbed, every second step saved."""
    folder = tmp_path_factory.mktemp("survival")
    assert main([str(tiny_run.write(folder)), *WORDS]) == 0
    return folder


WORDS = ["checkpoint.every=2", "train.validate_every=0", "memory.ns_steps=1"]


@pytest.fixture
def run(root: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of that run without its last checkpoint, and the words that go on with it."""
    shutil.copytree(root / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    return tmp_path / "run", [str(root / "tiny.toml"), *WORDS, f"run.directory={tmp_path}/run"]


def steps_saved(directory: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.folder_of(directory).iterdir())


# Checkpoints


def test_a_corrupted_shard_is_named_and_the_checkpoint_before_taken(
    root: Path, run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, words = run
    shard = next((directory / "checkpoints/step_00000004").glob("*.distcp"))
    flip(shard)
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"skipped the damaged checkpoint {shard.parent}: {shard.name} is not what was written" in said
    assert f"resumed from {directory}/checkpoints/step_00000002" in said
    assert tiny_run.losses(directory) == tiny_run.losses(root / "run")


def test_damaged_checkpoints_ahead_take_no_place(run: tuple[Path, list[str]]) -> None:
    """Behind two damaged ones a run goes on and keeps one: the one it has just saved, not those."""
    directory, words = run
    shutil.copytree(directory / "checkpoints/step_00000004", directory / "checkpoints/step_00000005")
    marker = directory / "checkpoints/step_00000005" / integrity.MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"step": 5}))
    for step in (4, 5):
        flip(next((directory / f"checkpoints/step_{step:08d}").glob("*.distcp")))
    words = [*words, "checkpoint.keep=1", "checkpoint.every=1", "train.steps=3"]
    assert main(words) == 0
    found, wrong = checkpoint.newest(directory)
    assert found is not None and found.name == "step_00000003"
    assert steps_saved(directory) == ["step_00000003", "step_00000004", "step_00000005"]
    assert all("half-written" in line for line in wrong) and len(wrong) == 2


def test_where_all_are_damaged_nothing_begins_anew(
    run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, words = run
    flip(next((directory / "checkpoints/step_00000004").glob("*.distcp")))
    cut = next((directory / "checkpoints/step_00000002").glob("*.distcp"))
    os.truncate(cut, cut.stat().st_size // 2)
    before = (directory / metrics.METRICS).read_text()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is left undamaged" in said
    assert f"{cut.name} has {cut.stat().st_size} of" in said
    assert steps_saved(directory) == ["step_00000002", "step_00000004"]
    assert (directory / metrics.METRICS).read_text() == before
    with pytest.raises(ValueError, match="is left undamaged"):
        checkpoint.load_model(directory)


def test_every_file_has_a_checksum_and_older_checkpoints_load_without(run: tuple[Path, list[str]]) -> None:
    directory, words = run
    for folder in checkpoint.folder_of(directory).iterdir():
        marker = json.loads((folder / integrity.MARKER).read_text())
        files = {file.name for file in folder.iterdir()} - {integrity.MARKER}
        assert marker["crc32"].keys() == marker["files"].keys() == files
        del marker["crc32"]
        (folder / integrity.MARKER).write_text(json.dumps(marker))
    assert main(words) == 0


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))


# Where a process is killed: as the first of these is called, or behind it.
KILLS: dict[str, tuple[object, str, bool]] = {
    "behind the shards": (checkpoint, "write_shards", True),
    "before the marker": (integrity, "mark", False),
    "before the name": (os, "rename", False),
    "while old ones are dropped": (Path, "unlink", True),
    "while one is loaded": (checkpoint, "load_sharded", False),
}


def killed_in(where: str, words: list[str]) -> None:
    """Train in this process, and die as soon as it comes there."""
    owner, name, behind = KILLS[where]
    kept = getattr(owner, name)

    def die(*given: object, **named: object) -> None:
        # The lock's files and the log's are not meant.
        if owner is Path and not str(given[0]).endswith(integrity.MARKER):
            return kept(*given, **named)
        if behind:
            kept(*given, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, die)
    main(words)


SHORT = ("before the name", "while one is loaded")


@pytest.mark.parametrize("where", [pytest.param(w, marks=[] if w in SHORT else [pytest.mark.parallel]) for w in KILLS])
def test_killed_while_saving_or_loading(root: Path, run: tuple[Path, list[str]], where: str) -> None:
    directory, words = run
    words.append("checkpoint.keep=2")
    assert forked(killed_in, where, words) == -signal.SIGKILL
    assert checkpoint.is_whole(directory / "checkpoints/step_00000004")
    if where == "while old ones are dropped":
        assert checkpoint.latest(directory) == (directory / "checkpoints/step_00000006", [])
        assert not checkpoint.is_whole(directory / "checkpoints/step_00000002")
    assert main(words) == 0
    assert tiny_run.losses(directory) == tiny_run.losses(root / "run")
    if where == "while old ones are dropped":
        # It was done; a longer run clears away what is left of them.
        assert main([*words, "train.steps=7"]) == 0
    assert len(steps_saved(directory)) == 2
    assert steps_saved(directory)[0] in ("step_00000004", "step_00000006")
    assert not (directory / run_lock.NAME).exists()


def without_room(words: list[str]) -> None:
    """Train where no file can grow to the size of a shard; a kernel says so much as of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    os._exit(main(words))


@pytest.mark.parametrize("while_training", ["false", "true"])
def test_a_shard_that_cannot_be_written(run: tuple[Path, list[str]], tmp_path: Path, while_training: str) -> None:
    directory, words = run
    words.append(f"checkpoint.async_save={while_training}")
    assert forked(without_room, words, lines=tmp_path / "said") == 2
    said = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("atlas-train: ")]
    assert len(said) == 1 and "the checkpoint of step 6 was not saved" in said[0] and "make room there" in said[0]
    assert steps_saved(directory) == ["step_00000002", "step_00000004"]
    assert main(words) == 0


# NaN and inf


def poisoned(monkeypatch: pytest.MonkeyPatch, batches: set[int]) -> list[int]:
    """Let these batches (from 0 on, as they are read) give NaN; what is read, and in which order, is returned."""
    next_batch, read = trainer.Batches.__next__, []

    def reading(self: trainer.Batches) -> dict[str, torch.Tensor]:
        number = self.consumed_samples // 4
        batch = next_batch(self)
        read.append(number)
        if number in batches:
            batch["loss_mask"][0, 0] = math.nan
        return batch

    monkeypatch.setattr(trainer.Batches, "__next__", reading)
    return read


def test_a_skipped_batch_changes_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batch 2 is passed over: the run is that of data without it, to the bit, also when it is resumed in between."""
    words = [str(root / "tiny.toml"), *WORDS, "resilience.non_finite=skip"]
    next_batch = trainer.Batches.__next__

    def without(self: trainer.Batches) -> dict[str, torch.Tensor]:
        if self.consumed_samples == 8:
            next_batch(self)
            next_batch(self)
        return next_batch(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Batches, "__next__", without)
        assert main([*words, f"run.directory={tmp_path}/without"]) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        poisoned(patch, {2})
        assert main([*words, f"run.directory={tmp_path}/skipped"]) == 0
        said = capsys.readouterr().out
        assert "step 3: loss is nan, first seen in no layer" in said
        assert "batch skipped (1 in a row, 1 in all)" in said
        assert tiny_run.losses(tmp_path / "skipped") == tiny_run.losses(tmp_path / "without")
        records = metrics.read(tmp_path / "skipped")
        assert [r.get("skipped") for r in records] == [None, None, 1, 1, 1, 1]
        shutil.rmtree(tmp_path / "skipped/checkpoints/step_00000006")
        assert main([*words, f"run.directory={tmp_path}/skipped"]) == 0
    assert metrics.read(tmp_path / "skipped")[-1]["skipped"] == 1
    assert tiny_run.losses(tmp_path / "skipped") == tiny_run.losses(tmp_path / "without")
    ours, theirs = (parameters(tmp_path / name) for name in ("skipped", "without"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_infinite_gradients_are_skipped_before_the_update(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = trainer._build
    passes = []

    def overflowing(gradient: torch.Tensor) -> torch.Tensor:
        passes.append(gradient)
        return gradient * math.inf if len(passes) in (5, 6) else gradient  # two micro-batches a step: the third

    def built(config: trainer.Config) -> checkpoint.TrainState:
        made = build(config)
        next(p for n, p in made.chunks[0].named_parameters() if "layers.0.norm" in n).register_hook(overflowing)
        return made

    monkeypatch.setattr(trainer, "_build", built)
    words = [str(root / "tiny.toml"), *WORDS, "resilience.non_finite=skip", f"run.directory={tmp_path}/run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "step 3: gradient norm is nan, first seen in gradient of norm.weight in layer 1" in said
    # The first two steps are the undisturbed run's; then its data is one batch ahead.
    assert tiny_run.losses(tmp_path / "run")[:2] == tiny_run.losses(root / "run")[:2]
    assert all(math.isfinite(r["loss"]) and math.isfinite(r["grad_norm"]) for r in metrics.read(tmp_path / "run"))
    assert metrics.read(tmp_path / "run")[-1]["skipped"] == 1


def test_after_several_in_a_row_it_goes_back_and_past_them(
    root: Path, run: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Batches 3 to 5 are bad: from step 2's checkpoint on, the run is that which goes on there with batch 6."""
    directory, words = run
    shutil.rmtree(directory / "checkpoints/step_00000004")
    shutil.copytree(directory, directory.with_name("elsewhere"))
    with monkeypatch.context() as patch:
        read = poisoned(patch, {3, 4, 5})
        assert main([*words, "resilience.non_finite=skip", "checkpoint.every=100"]) == 0
        assert [number for number in read if number < 100][:2] == [2, 2]
        assert sorted(set(read)) == [2, 3, 4, 5, 6, 7, 8, 9]
    said = capsys.readouterr().out
    assert "batch skipped (3 in a row, 3 in all)" in said
    assert f"went back to {directory}/checkpoints/step_00000002 (return 1 of at most 3): step 3 comes next" in said
    records = metrics.read(directory)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert (records[-1]["skipped"], records[-1]["returns"]) == (3, 1)
    # Trained on, not read.
    assert [r["tokens"] for r in records] == [r["step"] * records[0]["tokens"] for r in records]

    restore = checkpoint.restore

    def further(*given: object) -> checkpoint.Progress:
        return replace(restore(*given), consumed_samples=6 * 4)

    monkeypatch.setattr(checkpoint, "restore", further)
    elsewhere = directory.with_name("elsewhere")
    assert main([*words[:-1], f"run.directory={elsewhere}"]) == 0
    assert tiny_run.losses(directory) == tiny_run.losses(elsewhere)
    ours, theirs = parameters(directory), parameters(elsewhere)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("resilience.most_skipped=2", "resilience.most_skipped=2 batches were skipped"),
        ("resilience.most_returns=1", "resilience.most_returns=1 brought no more steps"),
        ("checkpoint.every=100", "there is nothing to go back to"),
    ],
)
def test_it_ends_where_all_is_bad(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: str,
    said: str,
) -> None:
    poisoned(monkeypatch, set(range(2, 100)))
    words = [str(root / "tiny.toml"), *WORDS, "resilience.non_finite=skip", f"run.directory={tmp_path}/run", limit]
    assert main(words) == 1
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1


def parameters(directory: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(checkpoint.load_model(directory)[0].named_parameters())
    finally:
        trainer.world.leave()
