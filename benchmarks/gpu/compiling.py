"""Compiles what the check launches into Triton's cache, without a GPU.

`python -m benchmarks.gpu.compiling 80,90 8 FILE`: for compute capabilities 8.0 and 9.0, in 8 processes; FILE, where it
is given, gets the cache's folders as JSON.

A launch on a GPU finds a kernel there, for both name it alike: by its source and those it calls (`launch.settle_key`),
its arguments' types and what is known of them, its warps, the version of Triton and of ptxas.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from atlas_kernels.gpu import newton_schulz as kernels
from atlas_kernels.gpu.launch import Variant, recording
from atlas_megatron.config import load
from benchmarks.contenders import OpInputs, contender, edges_of
from benchmarks.fake_gpu import DEVICE
from benchmarks.gpu import newton_schulz, training
from benchmarks.gpu.bench import MEMBERS, member_op
from benchmarks.gpu.numerics import MANY, TOKENS
from benchmarks.gpu.sections import SIZES

# Tokens of a sequence that is as good as a longer one: what is compiled knows of a number only whether it is 1, and
# whether 16 divides it, and these have several segments of several chunks.
ENOUGH = 1024
# Of an A100, an H100 or H200, a B200.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


def calls() -> dict[str, Callable[[], object]]:
    """What the sections call on the meta device, at their shapes but for the sequences' lengths."""
    found: dict[str, Callable[[], object]] = {}
    for name, (memory, _, tokens) in MEMBERS.items():
        found[name] = member_op(name, "triton", DEVICE, min(tokens, ENOUGH))
        small = OpInputs.random(replace(memory, heads=2), 1, TOKENS, DEVICE)
        many = OpInputs.random(replace(memory, heads=MANY["heads"]), MANY["batch"], TOKENS, DEVICE)
        found |= {f"{name}, {size}": partial(_both, given) for size, given in (("small", small), ("many", many))}
    for name, (config, changes) in training.RUNS.items():
        settings = load(training.ROOT / f"configs/{config}.toml", changes)
        memory, batch, tokens = settings.memory, settings.train.micro_batch, min(settings.model.seq_length, ENOUGH)
        given = {"products": torch.bfloat16, "device": DEVICE, "impl": "triton"}
        found[name] = contender(memory, batch=batch, tokens=tokens, **given)  # type: ignore[arg-type]
        edges = edges_of((batch, tokens, memory.heads, memory.head_dim), DEVICE)
        found |= {f"{name}, {edge}": partial(call, "triton") for edge, (call, _) in edges.items()}
    for name, (m, n) in SIZES.items():
        for stored in (torch.bfloat16, torch.float32):
            S = torch.empty(newton_schulz.COUNT, m, n, device=DEVICE, dtype=stored).requires_grad_()
            run = partial(newton_schulz.both, S, torch.bfloat16)
            found[f"{name} {stored}"] = run
            found |= {f"{name} {stored}, {w} warps": newton_schulz.with_warps(run, w) for w in newton_schulz.WARPS}
    return found


def _both(given: OpInputs) -> object:
    return given.gradients(given.output("triton", torch.bfloat16).sum())


@contextmanager
def as_on(arch: int) -> Iterator[None]:
    """What is launched once for each multiprocessor is launched as on a GPU of this compute capability."""
    usual = kernels._programs, torch.cuda.get_device_properties
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS[arch])
    kernels._programs = lambda count, at_once, device: usual[0](count, at_once, torch.device("cuda"))
    torch.cuda.get_device_properties = lambda *_: properties
    try:
        yield
    finally:
        kernels._programs, torch.cuda.get_device_properties = usual


def variants(arch: int) -> list[Variant]:
    """Each once."""
    found: dict[str, Variant] = {}
    with as_on(arch):
        for name, call in calls().items():
            with recording(f"{{}} of {name}") as recorded:
                call()
            for variant in recorded:
                found.setdefault(_key(variant), variant)
    return list(found.values())


def _key(variant: Variant) -> str:
    known: tuple[Any, ...] = (variant.signature, sorted(variant.constants.items(), key=str), variant.hints)
    return f"{variant.kernel.cache_key} {known} {variant.num_warps} {variant.num_stages} {variant.cooperative}"


def compile_for(variant: Variant, arch: int) -> Path:
    """The cache's folder of this variant."""
    source = ASTSource(variant.kernel, variant.signature, dict(variant.constants), dict(variant.hints))
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options["launch_cooperative_grid"] = variant.cooperative
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return Path(get_cache_manager(made.hash).cache_dir)


_wanted: list[tuple[Variant, int]] = []


def _compile(number: int) -> str:
    variant, arch = _wanted[number]
    return str(compile_for(variant, arch))


def compile_all(archs: list[int], jobs: int) -> list[str]:
    """The cache's folders of what the check launches, compiled by so many processes."""
    _wanted[:] = [(variant, arch) for arch in archs for variant in variants(arch)]
    start = time.perf_counter()
    folders = []
    # Forked: what is to be compiled cannot be sent.
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        for number, folder in enumerate(pool.map(_compile, range(len(_wanted)))):
            folders.append(folder)
            print(f"{_wanted[number][0].name}, sm_{_wanted[number][1]}", flush=True)
    print(f"{len(folders)} kernels in {time.perf_counter() - start:.0f} s")
    return folders


def main(archs: str, jobs: str, file: str = "") -> None:
    folders = compile_all([int(arch) for arch in archs.split(",")], int(jobs))
    if file:
        Path(file).write_text(json.dumps(folders), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
