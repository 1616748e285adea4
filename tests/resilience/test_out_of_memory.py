"""A GPU whose memory does not suffice: one line with what would take less, and a snapshot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.config import load
from atlas_megatron.resilience import out_of_memory
from atlas_megatron.train import main
from atlas_megatron.training.trainer import Trainer
from tests.support import tiny_run

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("tiny")).parent


def test_a_step_without_memory_ends_the_run_with_what_would_take_less(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer._step

    def failing(self: Trainer, number: int) -> Any:
        if number == 4:
            raise torch.OutOfMemoryError(SAID)
        return step(self, number)

    monkeypatch.setattr(Trainer, "_step", failing)
    assert main([str(root / "tiny.toml"), f"run.directory={tmp_path}/run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("atlas-train: step 4: the memory of rank 0's device does not suffice for 2.00 GiB more")
    for remedy in ("train.micro_batch=1 (is 2): ", "train.recompute=true (is false): ", "parallel.tensor=2 with "):
        assert remedy in line
    folder, skipped = checkpoint.latest(tmp_path / "run")
    assert folder is not None and folder.name == "step_00000003" and not skipped
    assert not list((tmp_path / "run").glob("memory_step_*")), "a snapshot is of a GPU"


def test_remedies_carry_the_runs_values_and_take_less() -> None:
    config = load("configs/atlas-340m.toml")
    found = out_of_memory.remedies(config, 8)
    now = config.train.micro_batch
    assert any(line.startswith(f"train.micro_batch={now // 2} (is {now}): about ") for line in found)
    for line in found:
        after, before = map(float, re.findall(r"about ([\d.]+) GiB instead of ([\d.]+) GiB", line)[0])
        assert after < before


def test_what_cannot_be_is_not_advised(root: Path) -> None:
    words = ["train.micro_batch=1", "train.recompute=true", "memory.heads=3", "model.seq_length=32"]
    found = out_of_memory.remedies(load(root / "tiny.toml", words), 1)
    # Three heads divide over no two ranks, a micro-batch of one not at all, and what is on cannot be put on.
    assert [line.partition(" ")[0] for line in found] == ["parallel.context=2"]


def test_the_snapshot_is_named_and_a_full_disk_does_not_hide_the_advice(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(root / "tiny.toml", [f"run.directory={tmp_path}"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    monkeypatch.setattr(out_of_memory, "remedies", lambda *_: ["less"])
    error = out_of_memory.explained(torch.OutOfMemoryError(SAID), config, 7)
    snapshot = tmp_path / "memory_step_7_rank_0.pickle"
    assert snapshot.read_bytes() == b"snapshot" and str(error).endswith(f"less; its snapshot is {snapshot}")

    def full(path: str) -> None:
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", full)
    assert str(out_of_memory.explained(torch.OutOfMemoryError("no"), config, 7)).endswith("by estimate: less")
