"""What the machine is, the two rates that everything is held to, and whether the kernels came compiled."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch
import triton

from atlas_kernels.gpu.assembler import take_sound_ptxas
from benchmarks.gpu.bench import SIDE, Bench

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "fla-core", "titans-pytorch", "numpy")
COPIED = 2**28


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(bench: Bench) -> None:
    bench.figure("versions", value=versions())
    take_sound_ptxas()
    said = subprocess.run([triton.knobs.nvidia.ptxas.path, "--version"], capture_output=True, text=True, check=False)
    bench.figure("ptxas", value=said.stdout.strip().splitlines()[-1:])
    bench.figure("triton cache", value=str(triton.knobs.cache.dir))
    if not bench.dry:
        properties = torch.cuda.get_device_properties(0)
        bench.figure("device", value=f"{properties.name}, sm_{properties.major}{properties.minor}")


def rates(bench: Bench) -> None:
    copied = torch.empty(COPIED, device=bench.device, dtype=torch.bfloat16)
    seconds = bench.times(contenders={"matmul": bench.product(), "copy": copied.clone})
    bench.measured("matmul, TFLOP/s", value=2 * SIDE**3 / seconds["matmul"] / 1e12)
    bench.measured("copy, GB/s", value=2 * copied.nbytes / seconds["copy"] / 1e9)


def first_kernel(bench: Bench) -> None:
    """A kernel that a prepared cache holds: said at once whether it was found there."""
    from benchmarks.gpu.newton_schulz import forward, matrices

    S = matrices(bench, 64, 64)
    bench.times("first kernel", contenders={"newton_schulz 64 x 64": lambda: forward(S)}, rounds=1)
    if not bench.dry:
        cached = bench.compilations.hits > bench.compilations.misses
        bench.measured("first kernel", "cache", value="hit" if cached else "miss: every kernel is compiled here")


def compile_the_rest(bench: Bench) -> None:
    """On a miss: what all sections launch, a process a core, before they wait for one kernel after the other."""
    if bench.dry or not bench.compilations.misses:
        bench.figure("compiled ahead", value="nothing")
        return
    major, minor = torch.cuda.get_device_capability()
    words = [sys.executable, "-m", "benchmarks.gpu.compiling", f"{major}{minor}", str(os.cpu_count() or 1)]
    begun = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, timeout=bench.seconds_left, check=False)
    said = (done.stdout or done.stderr).strip().splitlines()[-1:]
    bench.measured("compiled ahead", value={"seconds": time.perf_counter() - begun, "said": said})
