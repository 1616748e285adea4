"""Whole training steps through the trainer, each run in a process of its own, on the quickstart's text."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from atlas_megatron.config import load
from atlas_megatron.config.checks import validate
from benchmarks.gpu.bench import Bench

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data/quickstart"
CPU_LOSSES = DATA / "cpu_losses.json"
STEPS, FIRST_COUNTED = 4, 3
RUN_SECONDS = 70  # that a run may take, start and compilation included
LOSS_STEPS = 20
CHECKED_ALONE = "on the fake GPU its configuration alone is checked"
FIGURES = ("tokens_per_second", "mfu", "peak_memory_bytes")

# 12 heads of 64: of 16 heads of 48 each would be padded to 64.
EXACT = ["memory.ns_period=1", "model.seq_length=1024", "train.global_batch=8", "train.micro_batch=8"]
NARROW = [*EXACT, "memory.heads=12", "memory.head_dim=64"]
WIDE = [*EXACT, "model.hidden_size=2048", "model.ffn_hidden_size=4096", "memory.heads=32", "attention.heads=32"]
ONCE = ["memory.ns_period=64"]
LONG = [*ONCE, "model.seq_length=32768", "train.micro_batch=1", "train.global_batch=1"]
# name: config, overrides.
RUNS: dict[str, tuple[str, list[str]]] = {
    "exact ATLAS, 12 layers, 768 wide, F = V": ("atlas-170m", [*NARROW, "memory.expansion=1"]),
    "atlas-340m, a write a chunk": ("atlas-340m", [*ONCE, "train.global_batch=16"]),
    "exact ATLAS, 12 layers, 768 wide, F = 2 V": ("atlas-170m", [*NARROW, "memory.expansion=2"]),
    "exact ATLAS, 24 layers, 2048 wide, F = V": ("atlas-340m", [*WIDE, "memory.expansion=1"]),
    "exact ATLAS, 24 layers, 2048 wide, F = 2 V": ("atlas-340m", [*WIDE, "memory.expansion=2"]),
    "atlas-340m, 4K x 8": ("atlas-340m", [*ONCE, "train.global_batch=8"]),
    "atlas-340m, 32K x 1": ("atlas-340m", LONG),
}
FIRST = tuple(RUNS)[:2]
SIZE_20M = [
    "model.pattern=M-M-M-M-M-*-M-M-M-M-M-", "model.hidden_size=384", "model.ffn_hidden_size=1024",
    "memory.heads=6", "attention.heads=6",
]  # fmt: skip


def words_of(config: str, changes: list[str], directory: Path) -> list[str]:
    """The trainer's command line; no checkpoint is written, for a billion parameters take longer than the steps."""
    data = [f'data.train=["{DATA}/train"]', f'data.validation=["{DATA}/validation"]']
    data += [f"data.tokenizer={DATA}/tokenizer"]
    quiet = ["train.validate_every=0", "train.stats_every=1000", "log.tensorboard=false", f"run.directory={directory}"]
    unsaved = ["checkpoint.every=1000000", "checkpoint.last=false"]
    return [str(ROOT / f"configs/{config}.toml"), *changes, *data, *quiet, *unsaved]


def trained(words: list[str], directory: Path, seconds: float, *, gpu: bool = True) -> tuple[list[dict[str, Any]], str]:
    """The records of the steps that were taken within `seconds`, and what ended the run before its last (else "")."""
    environment = os.environ | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    command = [sys.executable, "-m", "atlas_megatron.train", *words]
    why = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )
        try:
            if run.wait(max(1.0, seconds)):
                said.seek(0)
                why = (said.read().strip().splitlines() or [f"status {run.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            why = f"took more than {seconds:.0f} s"
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
    return records_in(directory / "metrics.jsonl"), why


def records_in(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's records; none where it wrote none."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def summary(records: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of the steps that count; the last of fewer, but for the first, which compiles."""
    counted = records[FIRST_COUNTED - 1 :] or records[1:][-1:]
    found = {key: [r[key] for r in counted if r.get(key) is not None] for key in FIGURES}
    return {key: statistics.median(values) for key, values in found.items() if values}


def steps(bench: Bench, name: str) -> None:
    """Tokens a second, MFU and peak memory of one of `RUNS`."""
    config, changes = RUNS[name]
    # Refused where the kernels do not cover it: "auto" would time torch.
    changes = [*changes, "memory.impl=triton", f"train.steps={STEPS}", "train.warmup_steps=1", "train.log_every=1"]
    directory = Path(tempfile.mkdtemp(prefix="gpu-check-")) / "run"
    words = words_of(config, changes, directory)
    validate(load(words[0], words[1:]), world_size=1)
    if bench.dry:
        bench.figure(name, "not run", value=CHECKED_ALONE)
        return
    _check_data()
    records, why = trained(words, directory, min(RUN_SECONDS, bench.seconds_left - 2))
    if why:
        bench.figure(name, "ended early", value=why)
    bench.figure(name, "steps", value=len(records))
    for key, value in summary(records).items():
        bench.measured(name, key, value=value)
    if len(records) < 2:
        raise RuntimeError(why or "no step was taken")


def loss_words(precision: str, impl: str, directory: Path) -> list[str]:
    changes = [*SIZE_20M, f"train.steps={LOSS_STEPS}", "train.warmup_steps=5"]
    return words_of("quickstart", [*changes, f"train.precision={precision}", f"memory.impl={impl}"], directory)


def losses(bench: Bench) -> None:
    """The first steps of a model of 20M parameters on the GPU, beside those of a CPU, which were computed before."""
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    for precision in ("float32", "bfloat16"):
        words = loss_words(precision, "triton", scratch / precision)
        validate(load(words[0], words[1:]), world_size=1)
        if bench.dry:
            bench.figure(precision, "not run", value=CHECKED_ALONE)
            continue
        _check_data()
        records, why = trained(words, scratch / precision, min(RUN_SECONDS, bench.seconds_left - 2))
        found = [record["loss"] for record in records]
        bench.measured(precision, "losses", value=found)
        if why:
            bench.figure(precision, "ended early", value=why)
        if not CPU_LOSSES.is_file():
            bench.figure(precision, "not compared", value="no losses of a CPU: make gpu-bundle ARGS=--cpu-losses")
            continue
        cpu = json.loads(CPU_LOSSES.read_text(encoding="utf-8"))["losses"]
        apart = [abs(ours - theirs) / theirs for ours, theirs in zip(found, cpu, strict=False)]
        bench.measured(precision, "largest relative difference", value=max(apart, default=0.0))


def _check_data() -> None:
    if importlib.util.find_spec("megatron") is None:
        raise RuntimeError("megatron-core is not installed")
    if not (DATA / "train.bin").is_file():
        raise RuntimeError(f"{DATA} holds no text; make quickstart prepares it")
