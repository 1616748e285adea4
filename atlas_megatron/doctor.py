"""`atlas-doctor`: what this machine has for training, what each part will run on, and whether the least of it works."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import multiprocessing
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if Path(sys.argv[0]).stem in ("atlas-doctor", "doctor"):
    # Before torch, which takes seconds.
    from atlas_megatron.cli.ending import say_interrupts

    say_interrupts("atlas-doctor")

import torch
from rich.console import Console
from rich.table import Table

from atlas_kernels import Gates, MemoryRule, omega_memory
from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version

# Relative RMS between the chunk form and the reference in float32: the tests' tolerance.
TOLERANCE = 2e-4
SECONDS = 60  # after which an all-reduce is taken for hung


@dataclass(frozen=True)
class Extra:
    """A package that a part can do without."""

    module: str
    package: str
    brings: str
    install: str


EXTRAS = (
    Extra(
        "transformer_engine", "transformer-engine",
        "fused linears and norms, FP8 (model.transformer_engine, train.fp8)",
        "pip install --no-build-isolation 'transformer-engine[pytorch]==2.20.2'",
    ),
    Extra(
        "apex", "apex", "gradients summed inside the linears' products, a fused Adam",
        "is built from source: github.com/NVIDIA/apex, with its CUDA extensions",
    ),
    Extra(
        "fla", "flash-linear-attention", "kernels for D and G layers (delta.impl)", "pip install flash-linear-attention"
    ),
    Extra(
        "causal_conv1d", "causal-conv1d", "a fused short convolution, for flash-linear-attention",
        "pip install --no-build-isolation causal-conv1d",
    ),
    Extra("emerging_optimizers", "emerging-optimizers", "Muon (train.optimizer)", "pip install -e '.[muon]'"),
    Extra("deepspeed", "deepspeed", "ZeRO outside of Megatron", "pip install deepspeed==0.19.8"),
    Extra("transformers", "transformers", "models in Hugging Face's form", "pip install -e '.[hf]'"),
)  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    """Print the screen; its exit status, of which 1 is a self-test that failed."""
    return command("atlas-doctor", lambda: _look(_parser().parse_args(words)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="atlas-doctor", description=__doc__, epilog="example: atlas-doctor")
    add_version(parser)
    return parser


def _look(_: argparse.Namespace) -> int:
    warnings.filterwarnings("ignore", category=UserWarning)
    # First the processes: they are forked, which is safe only before torch has threads.
    checks = {"all-reduce of two processes, gloo": all_reduce("gloo", 2)}
    if torch.cuda.is_available():
        count = min(2, torch.cuda.device_count())
        checks[f"all-reduce of {count} GPU{'s' if count > 1 else ''}, NCCL"] = all_reduce("nccl", count)
    checks["memory, chunked against reference"] = memory_agrees()
    console = Console(soft_wrap=True, markup=False, highlight=False)
    console.print(_table("this machine", machine()))
    console.print(_table("what each part will run on", parts()))
    absent = [extra for extra in EXTRAS if not found(extra)]
    if absent or not shutil.which("sbatch"):
        console.print(_missing(absent))
    console.print(_table("self-test", {name: failure or "works" for name, failure in checks.items()}))
    failed = [f"{name}: {failure}" for name, failure in checks.items() if failure]
    for line in failed:
        print(f"atlas-doctor: self-test failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def machine() -> dict[str, str]:
    """Versions, and devices with their compute capability."""
    rows = {"Python": platform.python_version(), "torch": str(torch.__version__)}
    rows["CUDA of torch"] = torch.version.cuda or "none"
    rows["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "no GPU to use it"
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        rows[f"GPU {number}"] = f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.device_count():
        rows["GPU"] = "none: Megatron-Core runs on CPU tensors, processes talk by gloo"
    rows["Megatron-Core"] = _version("megatron-core")
    for extra in EXTRAS:
        rows[extra.package] = _version(extra.package) if found(extra) else "not installed"
    rows["SLURM"] = shutil.which("sbatch") or "sbatch is not on PATH"
    return rows


def parts() -> dict[str, str]:
    """What each part of a model chooses here, asked of the part itself."""
    # Here: Megatron takes seconds, which --help should not cost.
    from atlas_megatron.parallel import cpu

    cpu.install()
    from megatron.core import optimizer
    from megatron.core.tensor_parallel import layers

    from atlas_megatron.mixers import delta

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    flash = delta.choose_kernel("auto", dtype, 64) is delta.flash_kernel
    engine = on_gpu and importlib.util.find_spec("transformer_engine") is not None
    fused = on_gpu and layers._grad_accum_fusion_available
    adam = optimizer.Adam
    return {
        "memory": f"atlas_kernels, impl={chosen_memory()!r}",
        "delta rule (D, G)": "flash-linear-attention" if flash else "atlas_kernels",
        "linears and norms": "Megatron-Core's; Transformer Engine's "
        + ("with model.transformer_engine=true" if engine else "cannot be used here"),
        "attention": "torch's scaled_dot_product_attention",
        "optimizer": f"{adam.__module__.partition('.')[0]}'s {adam.__name__}, sharded by Megatron-Core",
        "gradients of the linears": "summed inside their products" if fused else "summed after their products",
        "precision": "bfloat16, float32 master weights" if on_gpu else "float32",
    }


def chosen_memory() -> str:
    """The implementation that omega_memory's impl="auto" says it takes on this machine."""
    said: list[str] = []
    logger, handler = logging.getLogger("atlas_kernels"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        _memory("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    # It says so once in a process.
    chosen = re.findall(r"chose '(\w+)'", "\n".join(said))
    return chosen[0] if chosen else "auto"


def memory_agrees() -> str:
    """Empty, or what is wrong with the memory on this machine's device: the chunk form against the reference."""
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        expected, found = (_memory(impl, device) for impl in ("reference", "chunked"))
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    for name in expected:
        apart = ((found[name] - expected[name]).norm() / expected[name].norm()).item()
        if not apart <= TOLERANCE:
            return f"{name} differs by {apart:.1e} of its size, more than {TOLERANCE:.0e}"
    return ""


def _memory(impl: str, device: torch.device) -> dict[str, torch.Tensor]:
    """What a small ATLAS memory reads [1, 32, 2, 8], and the gradients of its square sum."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    rule = MemoryRule(memory="mlp", window=4, chunk=8, ns_steps=5, ns_period=8, norm="layer")
    q, k, v = (torch.nn.functional.normalize(draw(1, 32, 2, 8), dim=-1).requires_grad_() for _ in range(3))
    gate = lambda start, *more: (start + 0.01 * draw(1, 32, 2, *more)).requires_grad_()  # noqa: E731
    gates = Gates(alpha=gate(0.97), eta=gate(0.05), theta=gate(0.9), gamma=gate(0.5, 4))
    weights = (0.3 * draw(2, 8, 16), 0.3 * draw(2, 16, 8))
    y, _ = omega_memory(q, k, v, gates, weights, rule, impl=impl)
    y.square().sum().backward()
    gradients = {"q": q, "k": k, "v": v, **vars(gates)}
    return {"y": y.detach(), **{f"gradient of {name}": leaf.grad for name, leaf in gradients.items()}}


def all_reduce(backend: str, size: int) -> str:
    """Empty, or what is wrong with a sum over `size` processes of this machine."""
    # A forked process starts at once, but cannot use CUDA.
    start = multiprocessing.get_context("fork") if backend == "gloo" else multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        given = (size, backend, str(Path(folder) / "rendezvous"))
        processes = [start.Process(target=_sum, args=(rank, *given), daemon=True) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
        ends = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    if all(end == 0 for end in ends):
        return ""
    hung = [rank for rank, end in enumerate(ends) if end is None]
    return f"ranks {hung} did not answer in {SECONDS} s" if hung else f"the processes ended with {ends} instead of 0"


def _sum(rank: int, size: int, backend: str, file: str) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=size)
    ones = torch.full((1024,), float(rank + 1), device=device)
    torch.distributed.all_reduce(ones)
    correct = bool((ones == size * (size + 1) / 2).all())
    torch.distributed.destroy_process_group()
    sys.exit(0 if correct else 1)


def found(extra: Extra) -> bool:
    return importlib.util.find_spec(extra.module) is not None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "installed, of unknown version"


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(f"  {name}", value)
    return table


def _missing(absent: list[Extra]) -> Table:
    rows = {extra.package: f"{extra.brings}: {extra.install}" for extra in absent}
    if not shutil.which("sbatch"):
        rows["SLURM"] = "jobs over nodes (launch/slurm.sh): the cluster's; to try it, apt-get install slurm-wlm munge"
    return _table("what is missing, what it would bring, and how to get it (all of it optional)", rows)


if __name__ == "__main__":
    sys.exit(main())
