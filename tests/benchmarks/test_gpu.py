"""The GPU's check, as far as a machine without one can see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from atlas_megatron.config import load
from atlas_megatron.config.checks import validate
from atlas_megatron.model.build import num_params
from benchmarks import goals, gpu


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmarks.gpu"])
    assert gpu.main() == 2
    assert "no GPU is visible" in capsys.readouterr().err


def test_the_timed_runs_are_valid_configs() -> None:
    for config, words in gpu.RUNS.values():
        validate(load(gpu.ROOT / f"configs/{config}.toml", words), world_size=1)
    small = load(gpu.ROOT / "configs/quickstart.toml", gpu.SIZE_20M)
    validate(small, world_size=1)
    assert num_params(small) == pytest.approx(20e6, rel=0.1)


def test_the_timed_memories_run_as_the_benchmark_makes_them() -> None:
    members = gpu.op_members()
    assert members["atlas, a write a chunk"].rule().ns_period == members["omeganet"].chunk
    for memory in members.values():
        gpu.contender(memory, batch=1, tokens=memory.chunk)()


def test_the_edges_run_as_they_are_timed() -> None:
    """Kernels and torch, every gradient; in bfloat16, which the interpreter cuts off where a GPU rounds."""
    for call, _ in gpu.edges_of((2, 5, 3, 16), "cpu").values():
        for ours, theirs in zip(call("triton"), call("torch"), strict=True):
            assert (ours - theirs).float().norm() < 4e-2 * theirs.float().norm()


def test_what_cannot_be_captured_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def graphed(run):
        if run is bad:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return "replayed"

    bad, good = (lambda: None), (lambda: None)
    monkeypatch.setattr(gpu, "graphed", graphed)
    assert gpu.graphs_of({"a": bad, "b": good}) == {"b, CUDA graph": "replayed"}
    assert capsys.readouterr().out == "  a: no CUDA graph: operation not permitted when stream is capturing\n"


def test_a_failing_section_leaves_the_others_and_is_named() -> None:
    report = gpu.Report()

    def fails() -> None:
        raise RuntimeError("no such kernel\nand more")

    report.section("first", fails)
    report.section("second", lambda: {"a": {"seconds": 0.125, "losses": [1.0]}})
    report.started -= gpu.BUDGET
    report.section("late", fails)
    assert report.not_run == {"first": "RuntimeError: no such kernel", "late": f"the {gpu.BUDGET} s were over"}
    written = gpu.markdown(
        {"device": "D", "command": "c", "commit": "x", "tests": "1 passed", **vars(report)} | {"started": None}
    )
    assert "| second / a / seconds | 0.125 |" in written and "losses" not in written
    assert "| first | not run: RuntimeError: no such kernel |" in written


def test_runs_that_fail_or_come_too_late_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second, *rest = gpu.RUNS
    begun: list[str] = []

    def train(config: str, words: list[str], directory: Path) -> list[dict[str, float]]:
        assert "memory.impl=triton" in words  # else "auto" might time torch
        begun.append(config)
        if len(begun) == 2:
            raise RuntimeError("took more than 120 s")
        return [{"tokens_per_second": rate, "mfu": 0.25} for rate in (1.0, 1.0, 1.0, 5.0, 7.0, 9.0)]

    monkeypatch.setattr(gpu, "train", train)
    found = gpu.bench_training(tmp_path, lambda: len(begun) == 2)
    assert found[first] == {"tokens_per_second": 7.0, "mfu": 0.25}
    assert found[second] == {"not_run": "took more than 120 s"}
    assert all(found[name] == {"not_run": gpu.OVER} for name in rest) and len(begun) == 2


def test_every_goal_finds_its_figure_in_a_report() -> None:
    run = {"tokens_per_second": 4000.0, "mfu": 0.2, "peak_memory_bytes": 50e9}
    size = {"share_of_matmul_rate": 0.6, "times_torch_compile": 2.4}
    seconds = {f"{name}: triton": 0.3 for name in gpu.op_members()}
    sections = {
        goals.NEWTON_SCHULZ: {"64 x 64": size, "64 x 256": size},
        goals.MEMORY_OP: {"seconds": {**seconds, goals.GATED_DELTA: 0.04, goals.TITANS: 0.6}},
        goals.TRAINING: {name: run for name in gpu.RUNS},
    }
    rows = goals.table(sections).splitlines()[2:]
    assert len(rows) == len(goals.GOALS) and not any("not run" in row for row in rows)
    assert "| exact ATLAS, 24 layers, 2048 wide, F = 2 V, T=1024: tokens/s | at least 3,080 | 4,000 | reached |" in rows
    assert "| Newton-Schulz 64 x 64: times torch.compile | at least 3 | 2.4 | 0.80 of it |" in rows
    assert "| omeganet's op: times Gated DeltaNet's seconds | at most 6 | 7.5 | 1.25 of it |" in rows
    del sections[goals.TRAINING], seconds
    missing = [row for row in goals.table(sections).splitlines() if row.endswith("| not run | |")]
    assert len(missing) == len(goals.EXACT) + 3


def test_what_the_readme_says_of_the_goals_is_what_was_measured() -> None:
    report = gpu.ROOT / "docs/results/gpu/check.json"
    sections = json.loads(report.read_text(encoding="utf-8"))["sections"] if report.exists() else {}
    assert goals.table(sections) in (gpu.ROOT / "kernels/README.md").read_text(encoding="utf-8")
