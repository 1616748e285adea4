"""Time the memory on this machine: beside titans-pytorch's, beside its own arithmetic, and what it holds in memory.

Every contender runs once a round, in turn, so that a change of the machine's speed meets them all; figures are medians
over rounds. Refuses to print while the kernels' tests are red.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from atlas_kernels import Gates, MemoryRule, chunked, initial_coefficients, lift, omega_memory
from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from atlas_megatron.config import MemoryConfig
from atlas_megatron.parallel.device import flush_denormals, keep_freed_memory
from benchmarks.report import made_by, write

DIM, HEADS, HEAD_DIM, HIDDEN, CHUNK, WINDOW = 384, 6, 64, 256, 64, 16
SHAPES = {"T=1024 B=1": (1, 1024), "T=4096 B=4": (4, 4096)}
# With the trainer's outer gradients.
MEMORY = MemoryConfig(heads=HEADS, head_dim=HEAD_DIM, expansion=HIDDEN // HEAD_DIM, window=WINDOW, chunk=CHUNK)
MEMORIES = {
    "k=0": replace(MEMORY, ns_steps=0),
    "k=0, read=chunk": replace(MEMORY, ns_steps=0, read="chunk"),  # what titans-pytorch computes: the chunk's start
    "k=5, ns_period=64": replace(MEMORY, ns_steps=5, ns_period=CHUNK),
}
RULES = {name: memory.rule() for name, memory in MEMORIES.items()}
MEMORY_LENGTHS = (4096, 16384)
# torch's counter knows baddbmm, but not in place.
IN_PLACE = {torch.ops.aten.baddbmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * a[2] * b[2]}
ROOT = Path(__file__).resolve().parents[1]


class Layer(nn.Module):
    """The memory with the projections of titans-pytorch's NeuralMemory: q, k, v, gates, output."""

    def __init__(self, rule: MemoryRule, impl: str) -> None:
        super().__init__()
        self.rule, self.impl = rule, impl
        self.qkv = nn.Linear(DIM, 3 * HEADS * HEAD_DIM, bias=False)
        self.gates = nn.Linear(DIM, HEADS * (3 + WINDOW))
        self.out = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)
        self.register_buffer("phi", initial_coefficients("hadamard", 2))
        W2 = torch.stack([nn.init.orthogonal_(torch.empty(HIDDEN, HEAD_DIM)) for _ in range(HEADS)])
        self.weights = nn.ParameterList([torch.randn(HEADS, HEAD_DIM, HIDDEN) * 0.02, W2])

    def memory_inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Gates]:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(-3)
        q, k = (lift(F.normalize(t, dim=-1), "hadamard", self.phi) for t in (q, k))
        alpha, eta, theta, gamma = self.gates(x).sigmoid().unflatten(-1, (HEADS, -1)).split([1, 1, 1, WINDOW], -1)
        # Step sizes as the configs derive them: the steps of one chunk sum to order one.
        scale = 0.1 * CHUNK if self.rule.ns_steps else 2 / (WINDOW * CHUNK * 10)
        return q, k, v, Gates(0.9 + 0.1 * alpha[..., 0], scale * eta[..., 0], 0.9 * theta[..., 0], gamma)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gates = self.memory_inputs(x)
        y, _ = omega_memory(q, k, v, gates, tuple(self.weights), self.rule, impl=self.impl)
        return self.out(F.rms_norm(y, y.shape[-1:]).flatten(-2))


def train_once(module: nn.Module, x: Tensor) -> None:
    """Forward and backward."""
    out = module(x)
    (out[0] if isinstance(out, tuple) else out).sum().backward()


def op_once(layer: Layer, x: Tensor) -> Callable[[], None]:
    """Forward and backward of the op alone, on inputs made once."""
    with torch.no_grad():
        q, k, v, gates = layer.memory_inputs(x)
    q, k, v, alpha, eta, theta, gamma = (t.clone().requires_grad_() for t in (q, k, v, *vars(gates).values()))

    def run() -> None:
        y, _ = omega_memory(q, k, v, Gates(alpha, eta, theta, gamma), tuple(layer.weights), layer.rule, impl=layer.impl)
        y.sum().backward()

    return run


def op_flops(layer: Layer, x: Tensor) -> int:
    """FLOPs of the op's matrix products in one forward, counted as it runs."""
    with torch.no_grad():
        q, k, v, gates = layer.memory_inputs(x)
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            omega_memory(q, k, v, gates, tuple(layer.weights), layer.rule, impl=layer.impl)
    return counter.get_total_flops()


def matmul_once() -> float:
    """Seconds of one 1024^3 float32 product."""
    a = torch.randn(1024, 1024)
    start = time.perf_counter()
    a @ a
    return time.perf_counter() - start


def timed(contenders: dict[str, Callable[[], None]], rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each contender in every round, in turn, and the matmul rate in FLOP/s over the same rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    product = []
    for round_ in range(rounds + 1):  # the first warms up
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            product.append(matmul_once())
            if round_:
                seconds[name].append(elapsed)
    return seconds, 2 * 1024**3 / statistics.median(product)


def medians(contenders: dict[str, Callable[[], None]], rounds: int) -> tuple[dict[str, float], float]:
    """As `timed`, the median of each contender's rounds."""
    seconds, rate = timed(contenders, rounds)
    return {name: statistics.median(times) for name, times in seconds.items()}, rate


def bench_shape(batch: int, tokens: int, rounds: int, with_reference: bool) -> dict:
    """All contenders at one shape: titans-pytorch, ours as a layer, ours as the op alone."""
    from titans_pytorch import NeuralMemory

    torch.manual_seed(0)
    x = torch.randn(batch, tokens, DIM, requires_grad=True)
    titans = NeuralMemory(dim=DIM, heads=HEADS, dim_head=HEAD_DIM, chunk_size=CHUNK)
    contenders: dict[str, Callable[[], None]] = {"titans-pytorch NeuralMemory": lambda: train_once(titans, x)}
    flops = {}
    for name, rule in RULES.items():
        layer = Layer(rule, "chunked")
        contenders[f"ours {name}: layer"] = lambda layer=layer: train_once(layer, x)
        contenders[f"ours {name}: op"] = op_once(layer, x)
        flops[f"ours {name}: op"] = 3 * op_flops(layer, x)
    seconds, rate = medians(contenders, rounds)
    if with_reference:
        slow = {f"ours {name}: op, reference": op_once(Layer(rule, "reference"), x) for name, rule in RULES.items()}
        seconds |= medians(slow, 1)[0]
    return {"seconds": seconds, "flops_forward_and_backward": flops, "matmul_flops_per_second": rate}


class LiveBytes(TorchDispatchMode):
    """The largest sum of live tensor storages, looked at after every 50th operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.operations = 0
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self.alive.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.operations += 1
        if self.operations % 50 == 0:
            self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def held_bytes(tokens: int, rule: MemoryRule) -> int:
    """Peak of live tensors in the op's forward and backward, beyond inputs, outputs and the gradients of both.

    Where memory is short, so that the backward computes segments again.
    """
    torch.manual_seed(0)
    layer = Layer(rule, "chunked")
    with torch.no_grad():
        q, k, v, gates = layer.memory_inputs(torch.randn(1, tokens, DIM))
    inputs = [t.clone().requires_grad_() for t in (q, k, v, *vars(gates).values())]
    with mock.patch.object(chunked, "HELD_BYTES", 0), LiveBytes() as live:
        y, _ = omega_memory(*inputs[:3], Gates(*inputs[3:]), tuple(layer.weights), rule, impl="chunked")
        y.backward(torch.ones_like(y))
    own = [*inputs, y, *layer.weights]
    return live.peak - 2 * sum(t.numel() * t.element_size() for t in own)


def print_tables(report: dict) -> None:
    console = Console(width=120)
    for shape, measured in report["shapes"].items():
        rate = measured["matmul_flops_per_second"]
        table = Table("forward + backward", "ms", "of titans-pytorch", "of its floor", title=f"{shape}, float32")
        titans = measured["seconds"]["titans-pytorch NeuralMemory"]
        for name, seconds in measured["seconds"].items():
            flops = measured["flops_forward_and_backward"].get(name)
            floor = f"{seconds * rate / flops:.2f}" if flops else ""
            table.add_row(name, f"{1e3 * seconds:,.0f}", f"{seconds / titans:.2f}", floor)
        console.print(table)
        console.print(f"matmul rate in the same rounds: {rate / 1e9:.0f} GFLOP/s")
        console.print("floor: 3 x forward FLOPs at it\n")
    table = Table("held beyond inputs, outputs, gradients, recomputed", *(f"T={t} MB" for t in MEMORY_LENGTHS), "ratio")
    for name, by_length in report["held_bytes"].items():
        short, long = (by_length[str(t)] for t in MEMORY_LENGTHS)
        table.add_row(name, f"{short / 1e6:.0f}", f"{long / 1e6:.0f}", f"{long / short:.2f}")
    console.print(table)


def main(words: Sequence[str] | None = None) -> int:
    """What the command line asks for; its exit status, of which 1 is a check that failed."""
    return command("benchmarks.memory", lambda: _bench(_parser().parse_args(words)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python -m benchmarks.memory --rounds 9 --json docs/results/memory_cpu.json",
    )
    add_version(parser)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds a shape (default 7)")
    parser.add_argument("--json", type=Path, default=Path("runs/bench_memory.json"), help="where the figures go")
    return parser


def _bench(arguments: argparse.Namespace) -> int:
    flush_denormals()
    keep_freed_memory()
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(ROOT / "tests" / "kernels")], cwd=ROOT)
    if tests.returncode:
        print("benchmarks.memory: the kernels' tests are red; no figure is printed before they pass", file=sys.stderr)
        return 1
    report = {
        **made_by("memory"),
        "shapes": {
            name: bench_shape(batch, tokens, arguments.rounds, with_reference=tokens == 1024)
            for name, (batch, tokens) in SHAPES.items()
        },
        "held_bytes": {
            name: {str(tokens): held_bytes(tokens, rule) for tokens in MEMORY_LENGTHS} for name, rule in RULES.items()
        },
    }
    print_tables(report)
    write(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
