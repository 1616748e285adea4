"""Compile every GPU kernel for sm_80, sm_90 and sm_100, without a GPU, and show what each takes of one.

Registers a thread, bytes of local memory a thread (spilled registers), shared memory of a program, columns of tensor
memory (sm_100), how many programs a multiprocessor holds by these, which tensor-core instructions are in the code, and
how much of their work is done twice (`tensor_core_work.py`). --check compares with kernels/resources.json and names
what grew; named as well is what could not be launched for want of shared or tensor memory, is done twice too often, or
takes its operands from the wrong place (`wgmma_operands.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atlas_kernels.gpu.architecture import planned_for
from atlas_megatron.cli.ending import command
from benchmarks import held
from benchmarks.tensor_core_work import executed_over_useful, programs_per_sm
from benchmarks.wgmma_operands import machine_code, stray_operands

NAME = "benchmarks.kernel_resources"
TABLE = held.ROOT / "kernels" / "resources.json"
FOLDER = "atlas_kernels.gpu"
NAMES = ("newton_schulz", "orthogonal_writes", "chain", "scan", "coefficients", "windows", "edges")
MODULES = tuple(f"{FOLDER}.{name}" for name in NAMES)
# Shared memory that one program may take, in bytes, by compute capability.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_COLUMNS = 512
INSTRUCTIONS = ("mma.sync", "wgmma", "tcgen05.mma")
GROWING = ("registers", "spilled", "shared")
# Tensor-core work issued over the products' arithmetic, at most, on the architecture that kernels are laid out for.
EXECUTED_OVER_USEFUL, LAID_OUT_FOR = 1.1, 90
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def all_variants(arch: int) -> list[Any]:
    """The variants of every module as launched on sm_<arch>, their names unique."""
    found = []
    for name in MODULES:
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not there; left out", file=sys.stderr)
            continue
        with planned_for(arch):
            found += importlib.import_module(name).variants()
    names = [variant.name for variant in found]
    doubled = {name for name in names if names.count(name) > 1}
    if doubled:
        raise ValueError(f"variants share a name: {', '.join(sorted(doubled))}; name them apart")
    return found


def measure(variant: Any, arch: int) -> dict[str, Any]:
    """What `variant` takes on sm_<arch>."""
    source = ASTSource(variant.kernel, variant.signature, dict(variant.constants), dict(variant.hints))
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options["launch_cooperative_grid"] = variant.cooperative
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    counted = {what: int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    figures = {
        "registers": counted["REG"],
        "spilled": counted["STACK"] + counted["LOCAL"],
        "shared": compiled.metadata.shared,
        "tensor_columns": getattr(compiled.metadata, "tmem_size", 0) or 0,
    }
    taken = (figures["registers"], figures["shared"], figures["tensor_columns"])
    return figures | {
        "programs_per_sm": programs_per_sm(arch, variant.num_warps, *taken),
        "executed_over_useful": executed_over_useful(compiled.asm["ttgir"]),
        "instructions": [name for name in INSTRUCTIONS if name in compiled.asm["ptx"]],
        "strays": len(stray_operands(machine_code(compiled.asm["cubin"]))) if arch == 90 else 0,
    }


def measure_all() -> held.Figures:
    """Of every variant and architecture, "name, sm_90": its figures."""
    return {f"{variant.name}, sm_{arch}": measure(variant, arch) for arch in SHARED for variant in all_variants(arch)}


def faults(measured: held.Figures, kept: held.Figures) -> tuple[list[str], list[str]]:
    """(what must not be, what is only worth saying) of the measured figures beside the kept ones."""
    bad, good = [], []
    for name, now in measured.items():
        arch = int(name.rpartition("sm_")[2])
        if now["shared"] > SHARED[arch]:
            bad.append(f"{name}: shared memory {now['shared']} of {SHARED[arch]} bytes, cannot be launched")
        if now["tensor_columns"] > TENSOR_COLUMNS:
            bad.append(f"{name}: {now['tensor_columns']} of {TENSOR_COLUMNS} tensor memory columns, cannot be launched")
        if arch == LAID_OUT_FOR and (now["executed_over_useful"] or 1.0) > EXECUTED_OVER_USEFUL:
            often = now["executed_over_useful"]
            bad.append(f"{name}: executes {often} times its products' arithmetic, at most {EXECUTED_OVER_USEFUL}")
        if now["strays"]:
            bad.append(f"{name}: {now['strays']} wgmma take an operand from the wrong place in shared memory")
        if name not in kept:
            bad.append(f"{name}: not in {TABLE.name}; run with --write")
            continue
        before = kept[name]
        for what in GROWING:
            if now[what] > before[what]:
                bad.append(f"{name}: {what} grew from {before[what]} to {now[what]}")
            elif now[what] < before[what]:
                good.append(f"{name}: {what} shrank from {before[what]} to {now[what]}")
        if now["programs_per_sm"] < before["programs_per_sm"]:
            fell = f"from {before['programs_per_sm']} to {now['programs_per_sm']}"
            bad.append(f"{name}: programs a multiprocessor fell {fell}")
        if before["instructions"] and not now["instructions"]:
            bad.append(f"{name}: no tensor-core instructions, it had {', '.join(before['instructions'])}")
    bad += [
        f"{name}: in {TABLE.name} and no longer compiled; run with --write" for name in kept if name not in measured
    ]
    return bad, good


def show(measured: held.Figures) -> None:
    table = Table("kernel", "registers", "spilled", "shared", "columns", "programs", "executed", "instructions")
    for name, now in measured.items():
        figures = (now["registers"], now["spilled"] or "-", now["shared"], now["tensor_columns"] or "-")
        shares = (now["programs_per_sm"], now["executed_over_useful"] or "-")
        table.add_row(name, *map(str, figures + shares), ", ".join(now["instructions"]) or "-")
    Console(width=120).print(table)


def main(words: Sequence[str] | None = None) -> int:
    """What the command line asks for; its exit status, of which 1 is a check that failed."""
    return command(NAME, lambda: _measure(held.parser_of(NAME, __doc__, TABLE), words))


def _measure(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> int:
    arguments = held.asked(parser, words, TABLE)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not compiled; unset it")
    start = time.perf_counter()
    measured = measure_all()
    show(measured)
    print(f"{len(measured)} compilations in {time.perf_counter() - start:.0f} s, triton {triton.__version__}")
    status = held.said(*faults(measured, json.loads(TABLE.read_text())["kernels"] if arguments.check else measured))
    if arguments.write and not status:
        made_by = {"command": f"python -m {NAME} --write", "triton": triton.__version__}
        held.write(TABLE, made_by | {"kernels": measured})
    return status


if __name__ == "__main__":
    sys.exit(main())
