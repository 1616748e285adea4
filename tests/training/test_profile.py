"""train.profile: a trace and a table of the steps that were asked for, which do not count as the run's speed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from atlas_megatron.config import load
from atlas_megatron.config.checks import validate
from atlas_megatron.config.watching_checks import profiled_steps
from atlas_megatron.train import main
from atlas_megatron.training import metrics, profiling
from tests.support import tiny_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("tiny")).parent


@pytest.fixture(scope="module")
def profiled(root: Path) -> Path:
    assert main([str(root / "tiny.toml"), f"run.directory={root}/profiled", "train.profile=2:4"]) == 0
    return root / "profiled"


def test_trace_and_table_are_written(profiled: Path) -> None:
    assert sorted(path.name for path in (profiled / "profile").iterdir()) == [
        "steps_2-3_rank_0.json", "steps_2-3_rank_0.txt",
    ]  # fmt: skip
    trace = json.loads((profiled / "profile/steps_2-3_rank_0.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::mm", "aten::embedding"} <= names
    header, *rows, others, whole = (profiled / "profile/steps_2-3_rank_0.txt").read_text().splitlines()
    assert header.split()[:5] == ["ms", "a", "step", "share", "calls"]
    shares = [float(re.findall(r"([\d.]+)%", row)[0]) for row in (*rows, others)]
    assert sum(shares) == pytest.approx(100, abs=0.1 * len(shares)) and shares[:-1] == sorted(shares[:-1], reverse=True)
    assert whole.endswith("in all, of 2 steps")
    assert "steps 2 to 3 are profiled: " in (profiled / "log.txt").read_text()


def test_profiled_steps_train_the_same_and_are_no_measure_of_speed(root: Path, profiled: Path) -> None:
    assert main([str(root / "tiny.toml"), f"run.directory={root}/plain"]) == 0
    found = metrics.read(profiled)
    assert [r["loss"] for r in found] == tiny_run.losses(root / "plain")
    assert [r["step"] for r in found if r.get("profiled")] == [2, 3]
    assert metrics.speeds_of(found) == [r["tokens_per_second"] for r in found if r["step"] not in (2, 3)]
    assert len(metrics.speeds_of(found[1:3])) == 2, "a run of profiled steps alone has a speed"


def test_a_resumed_run_profiles_what_is_left(root: Path) -> None:
    words = [str(root / "tiny.toml"), f"run.directory={root}/resumed", "checkpoint.every=1", "train.warmup_steps=1"]
    assert main([*words, "train.steps=2"]) == 0
    assert main([*words, "train.steps=4", "train.profile=2:5"]) == 0
    assert (root / "resumed/profile/steps_3-4_rank_0.json").is_file()


@pytest.mark.parallel
def test_each_process_of_one_replica_writes_its_own(root: Path) -> None:
    words = [f"run.directory={root}/pipeline", "parallel.pipeline=2", "model.pattern=M-|*-", "train.profile=1:2"]
    tiny_run.train_in(2, root / "tiny.toml", [words, [f"run.directory={root}/data", "train.profile=1:2"]])
    assert len(list((root / "pipeline/profile").glob("steps_1-1_rank_[01].json"))) == 2
    assert [path.name for path in (root / "data/profile").glob("*.json")] == ["steps_1-1_rank_0.json"]


def test_on_a_gpu_kernels_count_and_not_the_operators_that_start_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(key: str, kind: DeviceType, microseconds: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, device_type=kind, self_device_time_total=microseconds, self_cpu_time_total=1.0, count=3,
            is_user_annotation=annotation,
        )  # fmt: skip

    events = [
        event("aten::mm", DeviceType.CPU, 3000.0), event("gemm", DeviceType.CUDA, 3000.0),
        event("scan", DeviceType.CUDA, 1000.0), event("a step", DeviceType.CUDA, 4000.0, annotation=True),
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    lines = profiling.table(SimpleNamespace(key_averages=lambda: events), 2)
    assert [line.split() for line in lines[1:]] == [
        ["1.500", "75.0%", "3", "gemm"], ["0.500", "25.0%", "3", "scan"], ["0.000", "0.0%", "all", "others"],
        ["2.000", "100.0%", "in", "all,", "of", "2", "steps"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("5:5", "holds no step: STOP must be above START"),
        ("5:3", "holds no step"),
        ("0:2", "begins before step 1"),
        ("5:8", "goes beyond the last step, train.steps=6; give a STOP of at most 7"),
        ("5", "is no START:STOP"),
        ("a:b", "is no START:STOP"),
        ("-1:3", "is no START:STOP"),
    ],
)
def test_steps_that_are_not_there_are_refused(root: Path, given: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        validate(load(root / "tiny.toml", [f"train.profile={given}"]), 1)


def test_the_last_step_can_be_profiled(root: Path) -> None:
    assert profiled_steps(load(root / "tiny.toml", ["train.profile=6:7"])) == range(6, 7)
