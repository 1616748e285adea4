"""The GPU's check, as far as a machine without one can see it."""

from __future__ import annotations

import pytest
import torch

import gpu_check
from atlas_megatron.config import load
from atlas_megatron.config_checks import validate
from atlas_megatron.model import num_params


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert "no GPU is visible" in capsys.readouterr().err


def test_the_timed_runs_are_valid_configs() -> None:
    for config, words in gpu_check.RUNS.values():
        validate(load(gpu_check.ROOT / f"configs/{config}.toml", words), world_size=1)
    small = load(gpu_check.ROOT / "configs/quickstart.toml", gpu_check.SIZE_20M)
    validate(small, world_size=1)
    assert num_params(small) == pytest.approx(20e6, rel=0.1)


def test_the_timed_memories_run_as_the_benchmark_makes_them() -> None:
    members = gpu_check.op_members()
    assert members["atlas, a write a chunk"].rule().ns_period == members["omeganet"].chunk
    for memory in members.values():
        gpu_check.contender(memory, batch=1, tokens=memory.chunk)()


def test_what_cannot_be_captured_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def graphed(run):
        if run is bad:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return "replayed"

    bad, good = (lambda: None), (lambda: None)
    monkeypatch.setattr(gpu_check, "graphed", graphed)
    assert gpu_check.graphs_of({"a": bad, "b": good}) == {"b, CUDA graph": "replayed"}
    assert capsys.readouterr().out == "  a: no CUDA graph: operation not permitted when stream is capturing\n"


def test_a_failing_section_leaves_the_others_and_is_named() -> None:
    report = gpu_check.Report()

    def fails() -> None:
        raise RuntimeError("no such kernel\nand more")

    report.section("first", fails)
    report.section("second", lambda: {"a": {"seconds": 0.125, "losses": [1.0]}})
    report.started -= gpu_check.BUDGET
    report.section("late", fails)
    assert report.not_run == {"first": "RuntimeError: no such kernel", "late": f"the {gpu_check.BUDGET} s were over"}
    written = gpu_check.markdown(
        {"device": "D", "command": "c", "commit": "x", "tests": "1 passed", **vars(report)} | {"started": None}
    )
    assert "| second / a / seconds | 0.125 |" in written and "losses" not in written
    assert "| first | not run: RuntimeError: no such kernel |" in written
