"""What a machine with one GPU can check and time, in one command of at most ten minutes.

First the kernels' tests, on the GPU; while one is red nothing is timed. Then the loss of a small model's first steps on
the GPU beside the CPU's, the kernels beside torch and, where they are installed, beside their peers, and whole training
steps through `atlas-train`. Contenders run in turn, times are medians; all of it goes into one JSON with device,
versions and commit, and into a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

from atlas_kernels import newton_schulz
from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from atlas_megatron.commands import quickstart
from atlas_megatron.config import MemoryConfig, load
from atlas_megatron.config.memory_flops import memory_flops
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.reports.results import commit
from benchmarks import goals
from benchmarks.contenders import contender, edges_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "flash-linear-attention", "titans-pytorch")
ROUNDS = 7
BUDGET = 540  # seconds; what does not fit is listed as not run
OVER = f"the {BUDGET} s were over"
# batch, tokens, heads, head size of the memory op.
OP = (8, 4096, 16, 64)
DATA = ROOT / "data/quickstart"
# name: config, overrides.
EXACT = ["memory.ns_period=1", "model.seq_length=1024", "train.global_batch=8"]
WIDE = [
    *EXACT, "model.hidden_size=2048", "model.ffn_hidden_size=4096", "memory.heads=32", "attention.heads=32",
    "train.micro_batch=8",
]  # fmt: skip
RUNS: dict[str, tuple[str, list[str]]] = {
    "exact ATLAS, 12 layers, 768 wide, F = V": ("atlas-170m", [*EXACT, "memory.expansion=1", "train.micro_batch=8"]),
    "exact ATLAS, 12 layers, 768 wide, F = 2 V": ("atlas-170m", [*EXACT, "memory.expansion=2", "train.micro_batch=8"]),
    "exact ATLAS, 24 layers, 2048 wide, F = V": ("atlas-340m", [*WIDE, "memory.expansion=1"]),
    "exact ATLAS, 24 layers, 2048 wide, F = 2 V": ("atlas-340m", [*WIDE, "memory.expansion=2"]),
    "atlas-340m, a write a chunk": ("atlas-340m", ["memory.ns_period=64", "train.global_batch=16"]),
    "atlas-340m, 4K x 8": ("atlas-340m", ["memory.ns_period=64", "train.global_batch=8"]),
    "atlas-340m, 32K x 1": (
        "atlas-340m",
        ["memory.ns_period=64", "model.seq_length=32768", "train.micro_batch=1", "train.global_batch=1"],
    ),
}
SIZE_20M = [
    "model.pattern=M-M-M-M-M-*-M-M-M-M-M-", "model.hidden_size=384", "model.ffn_hidden_size=1024",
    "memory.heads=6", "attention.heads=6",
]  # fmt: skip
STEPS = 8  # of a timed run; the first three are not counted
RUN_SECONDS = 120  # that a run may take, start and compilation included


@dataclass
class Report:
    """Figures by section, what was skipped and why, and the clock."""

    started: float = field(default_factory=time.monotonic)
    sections: dict[str, Any] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)

    def over(self) -> bool:
        return time.monotonic() - self.started > BUDGET

    def section(self, name: str, measure: Callable[[], Any]) -> None:
        """Run one section, unless the time is over; a failure is noted and the next one goes on."""
        if self.over():
            self.not_run[name] = OVER
            return
        print(f"{name} ...", flush=True)
        try:
            self.sections[name] = measure()
        except Exception as error:  # what one section lacks is no reason to lose the others
            self.not_run[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"  not run: {self.not_run[name]}", flush=True)


def medians(contenders: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each on the GPU, in turn; the first two rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name, run in contenders.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if round_ >= 2:
                seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in seconds.items()}


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """`run` captured in a CUDA graph: what its kernels take when none waits for its launch. It must read no value."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def graphs_of(contenders: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Those of `contenders` that can be captured, as "name, CUDA graph"; of the others it says what was in the way."""
    found = {}
    for name, run in contenders.items():
        try:
            found[f"{name}, CUDA graph"] = graphed(run)
        except RuntimeError as error:
            print(f"  {name}: no CUDA graph: {str(error).splitlines()[0]}")
    return found


def matmul() -> Callable[[], object]:
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return lambda: a @ a


def bench_newton_schulz() -> dict[str, Any]:
    """8192 matrices, five steps, forward: the kernel, torch's products, these compiled, and each of the two as a CUDA
    graph; FLOPs of the direct form."""
    from atlas_kernels.gpu.newton_schulz import newton_schulz as kernel

    compiled = torch.compile(newton_schulz, dynamic=False)
    found = {}
    for m, n in ((64, 64), (64, 256)):
        S = torch.randn(8192, m, n, device="cuda", dtype=torch.bfloat16)
        contenders: dict[str, Callable[[], object]] = {
            "kernel": lambda S=S: kernel(S, 5),
            "torch.compile": lambda S=S: compiled(S, 5),
        }
        contenders |= graphs_of(contenders)
        contenders |= {"torch": lambda S=S: newton_schulz(S, 5), "matmul": matmul()}
        seconds = medians(contenders)
        yardstick = min(seconds[name] for name in seconds if name.startswith("torch.compile"))
        direct = 8192 * 5 * (4.0 * m * m * n + 2 * m**3)
        rate = 2 * 8192**3 / seconds["matmul"]
        found[f"{m} x {n}"] = {
            "seconds": seconds,
            "useful_flops": direct,
            "share_of_matmul_rate": direct / seconds["kernel"] / rate,
            "times_torch_compile": yardstick / seconds["kernel"],
        }
    return found


def op_members() -> dict[str, MemoryConfig]:
    """The memories whose op is timed."""
    base = MemoryConfig(heads=OP[2], head_dim=OP[3])
    once = {"ns_period": base.chunk}
    return {
        "omeganet": replace(base, **PRESETS["omeganet"]),
        # 48 tokens and a halo of 15 are 63 sources, which the kernels pad to 64; 64 and 15 they pad to 128.
        "omeganet, chunks of 48": replace(base, chunk=48, **PRESETS["omeganet"]),
        "titans": replace(base, **PRESETS["titans"]),
        "atlas, a write a chunk": replace(base, **(PRESETS["atlas"] | once)),
    }


def bench_op() -> dict[str, Any]:
    """The memory op at B=8, T=4096, 16 heads of 64, forward and backward, beside the chunk form in torch, both of these
    as CUDA graphs, and peers."""
    batch, tokens, _, _ = OP
    members = op_members()
    contenders: dict[str, Callable[[], object]] = {"matmul": matmul()}
    for name, memory in members.items():
        for impl in ("triton", "chunked"):
            contenders[f"{name}: {impl}"] = contender(
                memory, batch=batch, tokens=tokens, products=torch.bfloat16, device="cuda", impl=impl
            )
    contenders |= graphs_of({name: run for name, run in contenders.items() if name != "matmul"})
    for name, peer in (("flash-linear-attention Gated DeltaNet", gated_delta), ("titans-pytorch", titans)):
        try:
            contenders[name] = peer()
        except ImportError as error:
            print(f"  {name}: {error}")
    torch.cuda.reset_peak_memory_stats()
    seconds = medians(contenders, rounds=5)
    rate = 2 * 8192**3 / seconds["matmul"]
    floors = {name: 3 * batch * memory_flops(memory, tokens) / rate for name, memory in members.items()}
    return {
        "seconds": seconds,
        "times_floor": {name: seconds[f"{name}: triton"] / floor for name, floor in floors.items()},
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def bench_edges() -> dict[str, Any]:
    """The edges at the shape of OP: kernels, torch, torch compiled; the rate of copying a tensor is the floor."""
    copied, found = torch.empty(2**28, device="cuda", dtype=torch.bfloat16), {}
    for name, (call, moved) in edges_of(OP, "cuda").items():
        compiled = torch.compile(call, dynamic=False)
        contenders: dict[str, Callable[[], object]] = {
            "kernel": partial(call, "triton"),
            "torch": partial(call, "torch"),
            "torch.compile": partial(compiled, "torch"),
            "copy": copied.clone,
        }
        seconds = medians(contenders)
        rate = 2 * copied.nbytes / seconds["copy"]
        found[name] = {"seconds": seconds, "bytes": moved, "share_of_copy_rate": moved / rate / seconds["kernel"]}
    return found


def gated_delta() -> Callable[[], object]:
    """flash-linear-attention's Gated DeltaNet at the shape of OP."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    make = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = (make(*OP).requires_grad_() for _ in range(3))
    beta = make(*OP[:3]).sigmoid().requires_grad_()
    decay = F.logsigmoid(make(*OP[:3]).float()).requires_grad_()
    normal = lambda t: F.normalize(t, dim=-1)  # noqa: E731
    return lambda: chunk_gated_delta_rule(normal(q), normal(k), v, decay, beta)[0].float().square().mean().backward()


def titans() -> Callable[[], object]:
    """titans-pytorch's NeuralMemory of as many heads, at the shape of OP; with its projections."""
    from titans_pytorch import NeuralMemory

    batch, tokens, heads, size = OP
    memory = NeuralMemory(dim=heads * size, heads=heads, dim_head=size, chunk_size=64).cuda()
    x = torch.randn(batch, tokens, heads * size, device="cuda")
    return lambda: memory(x)[0].square().mean().backward()


def train(config: str, words: list[str], directory: Path, *, gpu: bool = True) -> list[dict[str, Any]]:
    """The records of a short run of `atlas-train` in a process of its own, on the quickstart's text.

    Raises RuntimeError where it fails or takes too long.
    """
    command = [sys.executable, "-m", "atlas_megatron.train", f"configs/{config}.toml", *words]
    command += [f"run.directory={directory}", f'data.train=["{DATA}/train"]', f'data.validation=["{DATA}/validation"]']
    command += [f"data.tokenizer={DATA}/tokenizer", "train.validate_every=0", "log.tensorboard=false"]
    environment = os.environ | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"took more than {RUN_SECONDS} s") from error
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def bench_training(scratch: Path, over: Callable[[], bool]) -> dict[str, Any]:
    """Tokens a second and MFU of whole training steps; none is begun when the time is over."""
    found: dict[str, Any] = {}
    for number, (name, (config, words)) in enumerate(RUNS.items()):
        # Refused where the kernels do not cover it: "auto" would time torch.
        steps = ["memory.impl=triton", f"train.steps={STEPS}", "train.warmup_steps=1"]
        steps += ["train.stats_every=1000", "train.log_every=1000"]
        if over():
            found[name] = {"not_run": OVER}
            continue
        try:
            records = train(config, [*words, *steps], scratch / f"run{number}")
        except RuntimeError as error:
            found[name] = {"not_run": str(error)}
            continue
        counted = records[3:]
        found[name] = {
            key: statistics.median(record[key] for record in counted)
            for key in ("tokens_per_second", "mfu", "peak_memory_bytes")
            if counted[0].get(key) is not None
        }
    return found


def loss_curves(scratch: Path) -> dict[str, Any]:
    """The first 20 steps of a model of 20M parameters: the CPU's in float32, the GPU's in float32 and bfloat16."""
    words = [*SIZE_20M, "train.steps=20", "train.warmup_steps=5", "train.stats_every=1000"]
    curves = {}
    for name, gpu, precision in (("cpu", False, "float32"), ("gpu", True, "float32"), ("gpu, bf16", True, "bfloat16")):
        changes = [*words, f"train.precision={precision}", f"memory.impl={'triton' if gpu else 'chunked'}"]
        records = train("quickstart", changes, scratch / name.replace(", ", "-"), gpu=gpu)
        curves[name] = [record["loss"] for record in records]
    apart = {
        name: max(abs(a - b) / b for a, b in zip(curves[name], curves["cpu"], strict=True))
        for name in curves
        if name != "cpu"
    }
    return {"losses": curves, "largest_relative_difference": apart}


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0], "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def tests() -> str:
    """The last line of the kernels' tests on this GPU. Raises RuntimeError if one is red."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", "-x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1]
    if done.returncode:
        raise RuntimeError(f"the kernels' tests are red, nothing is timed: {last}; run {' '.join(command[1:])}")
    return last


def markdown(report: dict[str, Any]) -> str:
    """The goals beside what was measured, every figure as a row, and what was not run."""
    lines = [f"# {report['device']}", "", f"`{report['command']}` at {report['commit']}: {report['tests']}", ""]
    lines += [goals.table(report["sections"]), "| what | figure |", "|---|---|"]

    def rows(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                rows(f"{name} / {key}", inner)
        elif not isinstance(value, list):
            lines.append(f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |")

    for name, section in report["sections"].items():
        rows(name, section)
    lines += [f"| {name} | not run: {why} |" for name, why in report["not_run"].items()]
    return "\n".join(lines) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """What the command line asks for; its exit status, of which 1 is a check that failed."""
    return command("benchmarks.gpu", lambda: _check(_parser().parse_args(words)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.gpu --out docs/results/gpu",
    )
    add_version(parser)
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu"), help="folder of check.json and check.md")
    return parser


def _check(arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        said = "no GPU is visible; run it on a machine with one (make test checks the rest)"
        print(f"benchmarks.gpu: {said}", file=sys.stderr)
        return 2
    try:
        passed = tests()
    except RuntimeError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 1
    report = Report()
    scratch = Path("runs/gpu_check") / str(os.getpid())
    report.section(goals.NEWTON_SCHULZ, bench_newton_schulz)
    report.section(goals.MEMORY_OP, bench_op)
    report.section("edges of the memory", bench_edges)
    failed = 0 if (DATA / "train.bin").is_file() else quickstart.prepare(load(quickstart.CONFIG))
    if failed:
        return failed
    report.section("loss of the first steps", lambda: loss_curves(scratch))
    report.section(goals.TRAINING, lambda: bench_training(scratch, report.over))
    written = {
        "command": " ".join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "commit": commit(),
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
        "tests": passed,
        "sections": report.sections,
        "not_run": report.not_run,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "check.json").write_text(json.dumps(written, indent=1) + "\n")
    (arguments.out / "check.md").write_text(markdown(written))
    Console().print(markdown(written))
    print(f"written: {arguments.out}/check.json, check.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
