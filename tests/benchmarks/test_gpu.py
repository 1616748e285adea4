"""The GPU's check, as far as a machine without one can see it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atlas_kernels.gpu.launch import counting
from atlas_megatron.cli.ending import TERMINATED
from atlas_megatron.config import load
from atlas_megatron.config.checks import validate
from atlas_megatron.model.build import num_params
from benchmarks import goals
from benchmarks.contenders import edges_of
from benchmarks.gpu import bench, check, newton_schulz, numerics, ops, peers, report, sections, training
from benchmarks.gpu.lines import BEGUN, DONE, FAILED, SKIPPED, Lines, figures, of_last_run, states
from tests.support.device_problems import NEWTON_SCHULZ_TOLERANCE, ROUNDED_TOLERANCE


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check.main([]) == 2
    assert "no GPU is visible" in capsys.readouterr().err


def test_an_unknown_section_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(["--sections", "op,ops", "--dry-run"])
    assert "--sections ops is unknown; choose of start, numerics" in capsys.readouterr().err


def test_every_section_fits_into_one_call() -> None:
    assert sum(section.cap for section in sections.SECTIONS.values() if section.chosen) <= 480
    # A rate is measured before anything is compiled.
    assert list(sections.SECTIONS["start"].parts)[:2] == ["machine", "rates"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a dry run of every section leaves."""
    out = tmp_path_factory.mktemp("dry")
    assert check.main(["--dry-run", "--out", str(out), "--sections", ",".join(sections.SECTIONS)]) == 0
    said = (out / "check.md").read_text(encoding="utf-8")
    assert said.startswith("# Host code on the fake GPU: nothing was measured\n")
    return json.loads((out / "check.json").read_text(encoding="utf-8"))


def test_the_host_code_of_every_section_runs(dry: dict[str, Any]) -> None:
    assert not dry["not_run"] and set(dry["sections"]) == {section.title for section in sections.SECTIONS.values()}
    launched = dry["sections"][goals.MEMORY_OP]["launches"]
    assert all(launched[f"{name}: triton"]["kernels"] for name in bench.NAMES.values())


def test_a_dry_run_reports_no_time(dry: dict[str, Any]) -> None:
    def names(of: Any) -> set[str]:
        return {name for key, value in of.items() for name in {key, *names(value)}} if isinstance(of, dict) else set()

    timed = {"seconds", "green", "times_floor", "share_of_matmul_rate", "times_torch_compile", "matmul, TFLOP/s"}
    assert not names(dry["sections"]) & timed
    assert goals.table(dry["sections"]).count("not run") == len(goals.GOALS)


def test_figures_are_lines_of_which_a_half_one_is_left_out(tmp_path: Path) -> None:
    lines = Lines(tmp_path)
    lines.add({"run": {"commit": "a", "device": "D", "dry_run": False}})
    lines.figure(("op", "seconds", "a"), 1.0)
    lines.add({"run": {"commit": "b", "device": "D", "dry_run": False}})
    lines.figure(("op", "seconds", "b"), 2.0)
    lines.add({"run": {"commit": "b", "device": "D", "dry_run": False, "command": "second"}})
    lines.figure(("op", "seconds", "b"), 3.0)
    lines.figure(("op", "floor"), "not known")
    lines.figure(("op", "floor", "a"), 0.5)
    with lines.path.open("a", encoding="utf-8") as file:
        file.write('{"at": ["op", "sec')
    run, kept = of_last_run(lines.read())
    # What another commit gave does not count; what an earlier call of the same one gave does.
    assert run["command"] == "second" and figures(kept) == {"op": {"seconds": {"b": 3.0}, "floor": {"a": 0.5}}}
    assert len(kept) == 4


def told(lines: Lines, out: Path, done: list[list[str]]) -> Any:
    """In place of a process: of its parts the first is done, the second kills it."""

    def process(folder: Path, name: str, parts: list[str], seconds: float) -> int:
        assert folder == out and seconds > 0
        done.append(parts)
        lines.part(name, parts[0], BEGUN)
        lines.part(name, parts[0], DONE)
        if len(parts) > 1:
            lines.part(name, parts[1], BEGUN)
        return -11

    return process


def test_where_a_process_dies_the_other_parts_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines, begun = Lines(tmp_path), []
    lines.add({"run": {"commit": "a", "device": "D"}})
    monkeypatch.setattr(check, "process", told(lines, tmp_path, begun))
    check.run_section(lines, "op", time.monotonic() + 100, dry=False)
    assert begun == [["omeganet", "once", "exact", "titans", "torch"], ["exact", "titans", "torch"], ["torch"]]
    found = {part: state for (_, part), state in states(lines.read()).items()}
    assert found["once"] == found["titans"] == (FAILED, "its process died")
    assert found["omeganet"] == found["torch"] == (DONE, "")
    assert report.write(lines)["not_run"] == {"op / once": "its process died", "op / titans": "its process died"}


def test_a_red_kernel_stops_its_own_parts_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines, begun = Lines(tmp_path), []
    lines.add({"run": {"commit": "a", "device": "D"}})
    for kernel, green in (("omeganet", False), ("exact", True)):
        lines.figure((sections.NUMERICS, kernel, numerics.GREEN), green)
    lines.part(sections.NUMERICS, "titans", FAILED, "CUDA error")
    lines.part(sections.NUMERICS, "once", FAILED, check.LATE)
    monkeypatch.setattr(check, "process", told(lines, tmp_path, begun))
    assert check.red_kernels(lines) == {"omeganet", "titans"}
    check.run_section(lines, "op", time.monotonic() + 100, dry=False)
    assert begun[0] == ["once", "exact", "torch"]
    found = states(lines.read())
    assert found["op", "omeganet"] == (SKIPPED, "the numerics of omeganet are red")


def test_what_finds_no_time_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = Lines(tmp_path)
    monkeypatch.setattr(check, "process", lambda *_: pytest.fail("no time was left"))
    check.run_section(lines, "peers", time.monotonic() + 1, dry=False)
    assert set(states(lines.read()).values()) == {(SKIPPED, "no time was left")}


def test_a_part_that_fails_leaves_the_next_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(_: bench.Bench) -> None:
        raise KeyError("matmul")

    parts = {"first": sections.Part(fails), "second": sections.Part(lambda b: b.figure("n", value=2))}
    monkeypatch.setitem(sections.SECTIONS, "start", sections.Section("machine", 20, parts))
    lines = Lines(tmp_path)
    assert check.run_parts(lines, "start", ["first", "second"], dry=True, seconds=9) == 0
    assert states(lines.read())["start", "first"] == (FAILED, "KeyError: 'matmul'")
    assert figures(lines.read()) == {"machine": {"n": 2}}


def test_a_broken_gpu_ends_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(_: bench.Bench) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    parts = {"first": sections.Part(fails), "second": sections.Part(fails)}
    monkeypatch.setitem(sections.SECTIONS, "start", sections.Section("machine", 20, parts))
    lines = Lines(tmp_path)
    assert check.run_parts(lines, "start", list(parts), dry=False, seconds=9) == check.BROKEN
    assert states(lines.read()).keys() == {("start", "first")}


def test_a_section_is_a_process_that_is_killed_in_time(tmp_path: Path) -> None:
    lines = Lines(tmp_path)
    assert check.process(tmp_path, "start", ["machine"], 120, dry=True) == 0
    assert states(lines.read())["start", "machine"] == (DONE, "")
    assert "torch" in figures(lines.read())["machine"]["versions"]
    begun = time.monotonic()
    assert check.process(tmp_path, "op", ["once"], 2.5, dry=True) != 0
    assert time.monotonic() - begun < 8


def test_a_check_that_is_told_to_end_writes_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def process(out: Path, name: str, parts: list[str], seconds: float) -> int:
        lines = Lines(out)
        lines.part(name, parts[0], BEGUN)
        lines.figure((name, "rate"), 2.5)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    monkeypatch.setattr(check, "process", process)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "D")
    assert check.main(["--sections", "start", "--out", str(tmp_path)]) == TERMINATED
    made = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert made["sections"] == {"start": {"rate": 2.5}} and made["not_run"] == {"start / machine": "did not end"}
    assert "| start / rate | 2.5 |" in (tmp_path / "check.md").read_text(encoding="utf-8")


def test_what_a_contender_lacks_is_named_and_the_others_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench, "medians", lambda runs, rounds: dict.fromkeys(runs, 0.25))
    monkeypatch.setattr(bench, "graphed", lambda run: run())
    made = bench.Bench(Lines(tmp_path), dry=False, until=0.0, section="op")
    assert made.times(contenders={"a": fails, "b": lambda: None}) == {"b": 0.25}
    assert made.graphs(contenders={"a": fails, "b": lambda: None}) == {"b, CUDA graph": None}
    assert figures(made.lines.read()) == {
        "op": {
            "seconds": {"b": 0.25},
            "not run": {
                "a": "RuntimeError: operation not permitted when stream is capturing",
                "a, CUDA graph": "operation not permitted when stream is capturing",
            },
        }
    }


def test_numerics_that_do_not_hold_are_red(tmp_path: Path) -> None:
    made = bench.Bench(Lines(tmp_path), dry=False, until=0.0, section=sections.NUMERICS)
    true = {"y": torch.ones(3, 4, dtype=torch.float64)}
    bits = iter(range(100))
    for name, run, holds in (
        ("right", lambda: {"y": torch.full((3, 4), 1.01)}, True),
        ("wrong", lambda: {"y": torch.full((3, 4), 1.2)}, False),
        ("nan", lambda: {"y": torch.full((3, 4), torch.nan)}, False),
        ("by chance", lambda: {"y": torch.full((3, 4), 1.0) + 1e-3 * next(bits)}, False),
    ):
        assert numerics._holds(made, name, run, true, {"y": numerics.MEMORY}) == holds, name
    found = figures(made.lines.read())[sections.NUMERICS]
    assert found["wrong"]["over its bound"] == ["y: 2.0e-01 of 5e-02"] and found["by chance"]["equal bits"] == ["y"]


def test_numerics_allow_what_the_tests_allow() -> None:
    assert numerics.NEWTON_SCHULZ == NEWTON_SCHULZ_TOLERANCE[torch.bfloat16]
    assert numerics.MEMORY <= ROUNDED_TOLERANCE[torch.bfloat16, "mlp"]


def test_a_plan_takes_the_warps_that_are_asked_for() -> None:
    usual = newton_schulz.kernels.plan(64, 256, torch.bfloat16, backward=False)
    with newton_schulz.planned_with(2):
        assert newton_schulz.kernels.plan(64, 256, torch.bfloat16, backward=False).warps == 2
    assert newton_schulz.kernels.plan(64, 256, torch.bfloat16, backward=False) == usual


def test_compilations_are_counted_by_part(tmp_path: Path) -> None:
    made = bench.Bench(Lines(tmp_path), dry=False, until=0.0, section="op")
    for part, hits in (("a", (True, False)), ("b", (True,)), ("c", ())):
        with made.counting_compilations(part):
            for hit in hits:
                made.compilations(src=None, times=SimpleNamespace(total=5e5), cache_hit=hit)
    found = figures(made.lines.read())["op"]["compilations"]
    assert found == {
        "a": {"from the cache": 1, "compiled": 1, "seconds": 1.0},
        "b": {"from the cache": 1, "compiled": 0, "seconds": 0.5},
    }


def test_the_edges_run_as_they_are_timed() -> None:
    """Kernels and torch, every gradient; in bfloat16, which the interpreter cuts off where a GPU rounds."""
    for call, _ in edges_of((2, 5, 3, 16), "cpu").values():
        for ours, theirs in zip(call("triton"), call("torch"), strict=True):
            assert (ours - theirs).float().norm() < 4e-2 * theirs.float().norm()


def test_the_timed_memories_run_as_the_benchmark_makes_them() -> None:
    assert bench.MEMBERS["once"][0].rule().ns_period == bench.MEMBERS["omeganet"][0].chunk
    assert (bench.MEMBERS["exact"][0].heads, bench.MEMBERS["exact"][0].rule().ns_period) == (12, 1)


def test_the_timed_runs_are_valid_configs() -> None:
    for config, words in training.RUNS.values():
        validate(load(training.ROOT / f"configs/{config}.toml", words), world_size=1)
    small = load(training.ROOT / "configs/quickstart.toml", training.SIZE_20M)
    validate(small, world_size=1)
    assert num_params(small) == pytest.approx(20e6, rel=0.1)
    narrow = load(training.ROOT / "configs/atlas-170m.toml", training.RUNS[training.FIRST[0]][1])
    # Heads of 48 would be padded to 64.
    assert (narrow.memory.heads, narrow.memory.head_dim, narrow.memory.rule().ns_period) == (12, 64, 1)


STEP = {"tokens_per_second": 9.0, "mfu": 0.25}


def test_of_a_run_the_steps_after_its_compilations_count(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert training.records_in(file) == [] and training.summary([]) == {}
    records = [STEP | {"step": n, "tokens_per_second": rate} for n, rate in enumerate((1.0, 2.0, 8.0, 10.0), 1)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 5', encoding="utf-8")
    assert training.summary(training.records_in(file)) == {"tokens_per_second": 9.0, "mfu": 0.25}
    assert training.summary(records[:2])["tokens_per_second"] == 2.0
    assert training.summary(records[:1]) == {}


def test_a_run_that_takes_too_long_keeps_its_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, line = str(tmp_path / "metrics.jsonl"), json.dumps(STEP) + "\n"
    program = f"import pathlib, time; pathlib.Path({file!r}).write_text({line!r}); time.sleep(60)"
    popen = training.subprocess.Popen
    python = training.sys.executable
    monkeypatch.setattr(training.subprocess, "Popen", lambda words, **named: popen([python, "-c", program], **named))
    records, why = training.trained([], tmp_path, 3)
    assert records == [STEP] and why == "took more than 3 s"


def test_a_run_that_fails_says_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    popen = training.subprocess.Popen
    words = [training.sys.executable, "-c", "raise SystemExit('atlas-train: no such key')"]
    monkeypatch.setattr(training.subprocess, "Popen", lambda _, **named: popen(words, **named))
    assert training.trained([], tmp_path, 30) == ([], "atlas-train: no such key")


def test_every_goal_finds_its_figure_in_a_report() -> None:
    run = {"tokens_per_second": 4000.0, "mfu": 0.2, "peak_memory_bytes": 50e9}
    both = ("64 x 64", "64 x 256")
    seconds = {f"{name}: triton": 0.3 for name in bench.NAMES.values()}
    found = {
        goals.NEWTON_SCHULZ: dict.fromkeys(both, {goals.SHARE: 0.6}),
        goals.REST: dict.fromkeys(both, {goals.COMPILED: 2.4}),
        goals.MEMORY_OP: {"seconds": seconds},
        goals.PEERS: {
            goals.GATED_DELTA: {"seconds": {goals.OMEGANET: 0.3, goals.GATED_DELTA: 0.04}},
            goals.TITANS: {"seconds": {goals.OMEGANET: 0.3, goals.TITANS: 0.6}},
        },
        goals.TRAINING: {name: run for name in training.RUNS},
    }
    rows = goals.table(found).splitlines()[2:]
    assert len(rows) == len(goals.GOALS) and not any("not run" in row for row in rows)
    exact = "exact ATLAS, 24 layers, 2048 wide, F = 2 V, T=1024: tokens/s"
    assert f"| {exact} | at least 3,080 | 4,000 | 1.30 (reached) |" in rows
    assert "| Newton-Schulz 64 x 64: times torch.compile | at least 3 | 2.4 | 0.80 (missed) |" in rows
    assert "| omeganet's op: times Gated DeltaNet's seconds | at most 6 | 7.5 | 1.25 (missed) |" in rows
    del found[goals.TRAINING]
    missing = [row for row in goals.table(found).splitlines() if row.endswith("| not run | |")]
    assert len(missing) == len(goals.EXACT) + 3


@pytest.fixture
def a_gpu_without_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run on a GPU does, on meta tensors: a call takes a millisecond, an error is small, nothing is launched."""
    monkeypatch.setattr(bench.Bench, "device", property(lambda _: "meta"))
    monkeypatch.setattr(bench.Bench, "tokens", lambda _, wanted: min(wanted, 128))
    monkeypatch.setattr(bench, "medians", lambda runs, rounds: dict.fromkeys(runs, 1e-3))
    monkeypatch.setattr(bench, "graphed", lambda run: run)
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    monkeypatch.setattr(torch, "equal", lambda a, b: a.shape == b.shape)
    monkeypatch.setattr(numerics, "relative_rms", lambda found, true: 1e-3)
    monkeypatch.setattr(ops, "ON_A_GPU", torch.autograd.DeviceType.CPU)
    monkeypatch.setattr(peers, "NEEDS", dict.fromkeys(peers.NEEDS, "torch"))
    monkeypatch.setattr(peers, "gated_delta", lambda: lambda: None)
    monkeypatch.setattr(peers, "titans", lambda: lambda: None)
    records = [{"tokens_per_second": 5.0, "mfu": 0.1, "peak_memory_bytes": 1e9}] * training.STEPS
    monkeypatch.setattr(training, "trained", lambda *_, **__: (records, ""))
    monkeypatch.setattr(training, "_check_data", lambda: None)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="D", major=9, minor=0))


@pytest.mark.usefixtures("a_gpu_without_a_clock")
def test_every_section_measures_what_the_goals_want(tmp_path: Path) -> None:
    lines = Lines(tmp_path)
    lines.add({"run": {"commit": "a", "device": "D"}})
    for name, section in sections.SECTIONS.items():
        if name != "losses":
            with counting(Counter()):
                assert check.run_parts(lines, name, list(section.parts), dry=False, seconds=100) == 0
    made = report.write(lines)
    assert not made["not_run"] and "not run" not in goals.table(made["sections"])
    assert not check.red_kernels(lines)
    profile = made["sections"]["profile"]["omeganet"]
    assert profile["kernels"]["calls"] > 100 and len(profile["by kernel"]) > 5
    assert made["sections"][sections.NUMERICS]["exact"]["green"] is True


def test_the_names_of_goals_are_those_of_sections() -> None:
    assert {f"{name}: triton" for name in bench.NAMES.values()} >= {goals.OMEGANET, "atlas, a write a chunk: triton"}
    assert set(goals.EXACT) | {goals.CHUNKWISE, "atlas-340m, 4K x 8", "atlas-340m, 32K x 1"} == set(training.RUNS)
    titles = {section.title for section in sections.SECTIONS.values()}
    assert {goals.NEWTON_SCHULZ, goals.MEMORY_OP, goals.TRAINING, goals.PEERS, goals.REST} <= titles
    assert set(sections.SIZES) == set(goals.SIZES)
