"""How long the memory op takes at least, told from its machine code and its launches; no GPU is needed.

Every launch of an op at its real shape is compiled for sm_90. A multiprocessor issues at most four instructions a
cycle, and its tensor cores have a rate: the slower of the two bounds a program, waves of programs bound a launch.
Instructions are counted in the machine code, loops by how often they turn. torch's operators take their bytes at the
rate of a copy, and each at least SHORTEST. What is left out makes a GPU slower than this: waiting for memory, for
barriers, for the results of other instructions. --write keeps the bounds in kernels/estimates.json.

These are bounds by arithmetic. None of them is a measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atlas_kernels.gpu.launch import Variant, recording
from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from benchmarks.contenders import contender
from benchmarks.fake_gpu import DEVICE, fake_gpu
from benchmarks.gpu import newton_schulz
from benchmarks.gpu.bench import MEMBERS, member_op
from benchmarks.gpu.compiling import as_on
from benchmarks.gpu.sections import SIZES
from benchmarks.kernel_resources import CUOBJDUMP
from benchmarks.tensor_core_work import loop_turns, multiply_adds, programs_per_sm

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "kernels" / "estimates.json"

# Of an H200: multiprocessors, cycles a second, bfloat16 FLOPs a second of its tensor cores, bytes a second of a copy.
MULTIPROCESSORS, CLOCK, TENSOR, COPY = 132, 1.75e9, 989e12, 4.0e12
SCHEDULERS = 4  # of a multiprocessor
# One long sequence: members of `benchmarks.gpu` with these keys changed. Chunks of a memory that never begins anew
# wait for each other, shards do not.
LONG = 32768  # tokens
SHARDS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{member} {of}": (member, {"chunk": chunk, "shard": shard} | ({"ns_period": chunk} if member == "once" else {}))
    for member in ("omeganet", "once")
    for chunk in (16, 64)
    for of, shard in ((f"chunk {chunk}", 0), (f"local {chunk}/2048", 2048))
}
OPERATOR, LAUNCH = 6e-6, 20e-6  # seconds of the host for an operator of torch's and for a launch of Triton's, about
SHORTEST = 2.2e-6  # seconds of the GPU for any operator
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\S* (?:!?U?P\w+, )?`?\(?0x([0-9a-f]+)")


@dataclass(frozen=True)
class Launch:
    """One launch: programs of `warps` warps, each with so many instructions a warp and tensor-core FLOPs (issued)."""

    kernel: str
    programs: int
    warps: int
    instructions: float
    flops: float
    programs_per_sm: int

    @property
    def seconds(self) -> float:
        """At least, on an otherwise idle GPU."""
        busiest = math.ceil(self.programs / MULTIPROCESSORS)  # programs of one multiprocessor, in all waves
        waves = math.ceil(busiest / self.programs_per_sm)
        # With fewer warps than schedulers, one warp's own turn bounds it.
        issued = max(busiest * self.warps / SCHEDULERS, waves) * self.instructions / CLOCK
        return max(issued, busiest * self.flops / (TENSOR / MULTIPROCESSORS))


def loops_of(code: str) -> tuple[list[int], list[tuple[int, int]]]:
    """(addresses of all instructions, first and last address of every loop) of disassembled machine code."""
    found = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(code)]
    loops = set()
    for at, text in found:
        target = _BRANCH.search(text)
        if target and int(target[1], 16) < at:
            loops.add((int(target[1], 16), at))
    return [at for at, text in found if not text.startswith("NOP")], sorted(loops, key=lambda loop: (loop[0], -loop[1]))


def matched(turns: list[int], loops: int) -> list[int]:
    """How often each of `loops` loops of the machine code turns, where the source has loops of `turns`, in order.

    A compiler unrolls the shortest ones: these are left out until as many are left.
    """
    kept = list(turns)
    while len(kept) > loops:
        kept.remove(min(kept))
    return kept + [1] * (loops - len(kept))


def instructions(code: str, turns: list[int]) -> float:
    """How many instructions a warp goes through, from the machine code and the source's loops."""
    addresses, loops = loops_of(code)
    times = matched(turns, len(loops))
    return sum(
        math.prod(t for (first, last), t in zip(loops, times, strict=True) if first <= at <= last) for at in addresses
    )


def launch_of(variant: Variant) -> Launch:
    """What one recorded launch takes."""
    source = ASTSource(variant.kernel, variant.signature, dict(variant.constants), dict(variant.hints))
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    options["launch_cooperative_grid"] = variant.cooperative
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run([CUOBJDUMP, what, file.name], check=True, capture_output=True, text=True).stdout
            for what in ("-sass", "--dump-resource-usage")
        )
    again = turns_at_run_time(variant)
    turns = [again if turn is None else turn for turn in loop_turns(compiled.asm["ttgir"])]
    registers = int(re.search(r"\bREG:(\d+)", usage)[1])  # type: ignore[index]
    _, issued = multiply_adds(compiled.asm["ttgir"], again)
    return Launch(
        kernel=variant.kernel.__name__.removesuffix("_kernel"),
        programs=math.prod(variant.grid),
        warps=variant.num_warps,
        instructions=instructions(code, turns),
        flops=2 * issued,
        programs_per_sm=programs_per_sm(90, variant.num_warps, registers, compiled.metadata.shared, 0),
    )


def turns_at_run_time(variant: Variant) -> int:
    """Of the loop whose length is an argument: over the N chunks, or over the K matrices of one."""
    names = variant.kernel.arg_names
    if "K" in names:
        return int(variant.arguments[names.index("K")])
    return next((int(sizes.N) for sizes in _tuples(variant.arguments) if getattr(sizes, "N", None)), 1)


def _tuples(arguments: tuple[Any, ...]) -> Iterator[Any]:
    for argument in arguments[:-1] if arguments else ():
        if isinstance(argument, tuple):
            yield argument
            yield from _tuples((*argument, None))


def bounds_of(call: Callable[[], object]) -> dict[str, Any]:
    """Seconds at least of each kernel's launches together, of torch's operators, of the GPU, and of the host about."""
    with fake_gpu() as counts:
        call()
    with as_on(90), recording("{}") as recorded:
        call()
    launches: list[Launch] = []
    known: dict[str, Launch] = {}
    for variant in recorded:
        # Most launches are of one of a few compilations.
        key = f"{variant} {variant.grid} {turns_at_run_time(variant)}"
        known[key] = known[key] if key in known else launch_of(variant)
        launches.append(known[key])
    kernels: dict[str, dict[str, Any]] = {}
    for name, times in Counter(launch.kernel for launch in launches).items():
        own = [launch for launch in launches if launch.kernel == name]
        kernels[name] = {
            "launches": times,
            "programs": max(launch.programs for launch in own),
            "programs_per_sm": min(launch.programs_per_sm for launch in own),
            "seconds": sum(launch.seconds for launch in own),
        }
    operators = torch_seconds(counts.torch_launches, counts.bytes)
    return {
        "kernels": kernels,
        "torch": {"operators": counts.torch_launches, "bytes": counts.bytes, "seconds": operators},
        "gpu_seconds": operators + sum(kernel["seconds"] for kernel in kernels.values()),
        "host_seconds": counts.torch_launches * OPERATOR + counts.launches * LAUNCH,
    }


def ops() -> dict[str, Callable[[], object]]:
    """The ops of `benchmarks.gpu`, one long sequence, and Newton-Schulz of many matrices, forward."""
    found: dict[str, Callable[[], object]] = {}
    for name, (_, batch, tokens) in MEMBERS.items():
        found[f"{name}, B={batch} T={tokens}"] = member_op(name, "triton", DEVICE, tokens)
    once, given = MEMBERS["once"][0], {"products": torch.bfloat16, "device": DEVICE, "impl": "triton"}
    found["once, B=1 T=32768"] = contender(once, batch=1, tokens=32768, **given)  # type: ignore[arg-type]
    for name, (member, keys) in SHARDS.items():
        own, label = replace(MEMBERS[member][0], **keys), f"shards: {name}, B=1 T={LONG}"
        found[label] = contender(own, batch=1, tokens=LONG, **given)  # type: ignore[arg-type]
    for name, (m, n) in SIZES.items():
        S = torch.empty(newton_schulz.COUNT, m, n, device=DEVICE, dtype=torch.bfloat16)
        found[f"Newton-Schulz {name}"] = partial(newton_schulz.forward, S)
    return found


def torch_seconds(operators: int, moved: int) -> float:
    """Of the GPU, for torch's operators, which move so many bytes together."""
    return max(operators * SHORTEST, moved / COPY)


def main(words: Sequence[str] | None = None) -> int:
    """What the command line asks for; its exit status."""
    return command("benchmarks.static_times", lambda: _bound(_parser().parse_args(words)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.static_times --ops omeganet once",
    )
    add_version(parser)
    parser.add_argument("--ops", nargs="+", help="the first words of those to bound (default all)")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    return parser


def _bound(arguments: argparse.Namespace) -> int:
    found: dict[str, Any] = {}
    for name, call in ops().items():
        if arguments.ops and not name.startswith(tuple(arguments.ops)):
            continue
        found[name] = bounds_of(call)
        table = Table(name, "launches", "programs", "a multiprocessor", "ms at least")
        for kernel, of in found[name]["kernels"].items():
            row = (of["launches"], of["programs"], of["programs_per_sm"])
            table.add_row(kernel, *map(str, row), f"{1e3 * of['seconds']:.2f}")
        torch_ = found[name]["torch"]
        table.add_row("torch", str(torch_["operators"]), "", "", f"{1e3 * torch_['seconds']:.2f}")
        table.add_row("all, on the GPU", "", "", "", f"{1e3 * found[name]['gpu_seconds']:.2f}")
        table.add_row("the host, about", "", "", "", f"{1e3 * found[name]['host_seconds']:.2f}")
        Console(width=120).print(table)
    if arguments.write and not arguments.ops:
        report = {"command": "python -m benchmarks.static_times --write", "triton": triton.__version__, "ops": found}
        TABLE.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {TABLE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
