"""Count what one memory layer launches, forward and backward, at the shapes that are trained; no GPU is needed.

Of every shipped configuration with a memory, and of the shapes that the goals name: launches of each kernel, torch
operators that launch one of torch's, and the bytes that these read and write. Inputs stand on the meta device, products
are in bfloat16. --check compares with kernels/launches.json and names what grew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from atlas_kernels.local_memories import groups_of
from atlas_megatron.cli.ending import command
from atlas_megatron.config import MemoryConfig, load, uses
from atlas_megatron.config.presets import PRESETS
from benchmarks import held
from benchmarks.contenders import contender, edges_of
from benchmarks.fake_gpu import DEVICE, fake_gpu

NAME = "benchmarks.launches"
TABLE = held.ROOT / "kernels" / "launches.json"
FOLDERS = ("configs", "configs/experiments")
# Sections that an experiment reads, and the trainer does not know.
OF_EXPERIMENTS = ("length",)
_ONCE = PRESETS["atlas"] | {"ns_period": 64}
_EXACT = PRESETS["atlas"] | {"ns_period": 1}
# name: memory, heads of 64, batch, tokens.
SHAPES: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "omeganet, B=8 T=4096": (PRESETS["omeganet"], 16, 8, 4096),
    "titans, B=8 T=4096": (PRESETS["titans"], 16, 8, 4096),
    "atlas, a write a chunk, B=8 T=4096": (_ONCE, 16, 8, 4096),
    "atlas, four writes a chunk, B=8 T=4096": (_ONCE | {"ns_period": 16}, 16, 8, 4096),
    "atlas, a write a chunk, B=1 T=32768": (_ONCE, 16, 1, 32768),
    "exact atlas, F = V, B=8 T=1024": (_EXACT | {"expansion": 1}, 12, 8, 1024),
    "exact atlas, F = 2 V, B=8 T=1024": (_EXACT | {"expansion": 2}, 12, 8, 1024),
}


def counted(run: Callable[[], object]) -> dict[str, Any]:
    """What a call would launch on a GPU."""
    with fake_gpu() as counts:
        run()
    kernels = dict(sorted(counts.kernels.items()))
    return {"kernels": kernels, "torch": counts.torch_launches, "torch_bytes": counts.bytes}


def memory_op(memory: MemoryConfig, batch: int, tokens: int) -> Callable[[], object]:
    return contender(memory, batch=batch, tokens=tokens, products=torch.bfloat16, device=DEVICE, impl="triton")


def of_config(name: str) -> held.Figures:
    """The memory and its edges at a configuration's own shape; what the kernels refuse is said in their place."""
    file = held.ROOT / f"{name}.toml"
    if any(section in tomllib.loads(file.read_text(encoding="utf-8")) for section in OF_EXPERIMENTS):
        return {}
    config = load(file)
    if not uses(config.model.pattern, "memory"):
        return {}
    memory, batch, tokens = config.memory, config.train.micro_batch, config.model.seq_length
    found: held.Figures = {}
    try:
        found[f"{name}: memory"] = counted(memory_op(memory, batch, tokens))
    except ValueError as refused:
        found[f"{name}: memory"] = {"refused": str(refused)}
    for (chunk, shard), numbers in groups_of(memory).items():
        alone = {"read": "token", "locals": (), "projection": False, "heads": memory.heads * len(numbers)}
        local = replace(memory, chunk=chunk, shard=shard, ns_period=min(memory.ns_period, chunk), **alone)  # type: ignore[arg-type]
        found[f"{name}: local {chunk}/{shard}"] = counted(memory_op(local, batch, tokens))
    shape = (batch, tokens, memory.heads, memory.head_dim)
    for edge, (call, _) in edges_of(shape, DEVICE).items():
        found[f"{name}: {edge}"] = counted(lambda call=call: call("triton"))  # type: ignore[misc]
    return found


def count_all() -> held.Figures:
    """Of every configuration and shape by name."""
    found: held.Figures = {}
    for folder in FOLDERS:
        for file in sorted((held.ROOT / folder).glob("*.toml")):
            found |= of_config(f"{folder}/{file.stem}")
    for name, (fields, heads, batch, tokens) in SHAPES.items():
        found[name] = counted(memory_op(replace(MemoryConfig(heads=heads, head_dim=64), **fields), batch, tokens))
    return found


def faults(counted: held.Figures, kept: held.Figures) -> tuple[list[str], list[str]]:
    """(what must not be, what is only worth saying) of the counts beside the kept ones."""
    bad, good = [], []
    for name in sorted(counted.keys() | kept.keys()):
        if name not in counted or name not in kept:
            bad.append(f"{name}: only {'counted' if name in counted else f'in {TABLE.name}'}; run with --write")
            continue
        now, before = counted[name], kept[name]
        if "refused" in now or "refused" in before:
            if now.get("refused") != before.get("refused"):
                bad.append(f"{name}: {now.get('refused') or 'is not refused any more; run with --write'}")
            continue
        for (what, figure), old in zip(_flat(now).items(), _flat(before).values(), strict=True):
            if figure > old:
                bad.append(f"{name}: {what} grew from {old:,} to {figure:,}")
            elif figure < old:
                good.append(f"{name}: {what} shrank from {old:,} to {figure:,}")
    return bad, good


def _flat(of: dict[str, Any]) -> dict[str, int]:
    """Launches of all kernels together: a piece of work may move from one to another."""
    return {"kernel launches": sum(of["kernels"].values()), "torch operators": of["torch"], "bytes": of["torch_bytes"]}


def show(counted: held.Figures) -> None:
    for name, of in counted.items():
        if "refused" in of:
            print(f"{name}: {of['refused']}")
            continue
        kernels = ", ".join(f"{kernel} {n}" for kernel, n in of["kernels"].items())
        launches = sum(of["kernels"].values())
        print(f"{name}: torch {of['torch']:,}, {of['torch_bytes'] / 1e9:.1f} GB; kernels {launches:,}: {kernels}")


def main(words: Sequence[str] | None = None) -> int:
    """What the command line asks for; its exit status, of which 1 is a check that failed."""
    return command(NAME, lambda: _count(held.parser_of(NAME, __doc__, TABLE), words))


def _count(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> int:
    arguments = held.asked(parser, words, TABLE)
    start = time.perf_counter()
    counted = count_all()
    show(counted)
    print(f"{len(counted)} counts in {time.perf_counter() - start:.0f} s")
    status = held.said(*faults(counted, json.loads(TABLE.read_text())["launches"])) if arguments.check else 0
    if arguments.write:
        held.write(
            TABLE, {"command": f"python -m {NAME} --write", "torch": torch.__version__, "launches": counted}
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
