"""Time memories that begin anew beside the same ones that do not: forward and backward of the op, in turn, on this CPU.

One sequence alone has few memories side by side, and the chunks of a plain memory wait for each other. Four sequences
keep a CPU busier. Figures are medians over rounds, ratios those within a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from atlas_megatron.config import MemoryConfig
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.parallel.device import flush_denormals, keep_freed_memory
from benchmarks.contenders import contender
from benchmarks.memory import timed
from benchmarks.presets import ratio
from benchmarks.report import made_by, write

HEADS, HEAD_DIM, TOKENS = 4, 64, 4096
BATCHES = (1, 4)
SHARD, GLOBAL_CHUNK = 512, 1024
MEMBERS = {
    "omeganet": MemoryConfig(heads=HEADS, head_dim=HEAD_DIM, **{**PRESETS["omeganet"], "window": 4}),
    "atlas, a write a chunk": MemoryConfig(heads=HEADS, head_dim=HEAD_DIM, **{**PRESETS["atlas"], "window": 4}),
}
CHUNKS = (8, 16, 64)


def memories(member: str) -> dict[str, MemoryConfig]:
    """Plain at each chunk, the same with shards, and a global memory that is read at its chunk's start."""
    base = MEMBERS[member]

    def at(chunk: int, **keys: Any) -> MemoryConfig:
        return replace(base, chunk=chunk, ns_period=chunk if base.ns_steps else 1, **keys)

    plain = {f"chunk {chunk}": at(chunk) for chunk in CHUNKS}
    local = {f"local {chunk}/{SHARD}": at(chunk, shard=SHARD) for chunk in CHUNKS}
    return plain | local | {f"global, chunk {GLOBAL_CHUNK}": at(GLOBAL_CHUNK, read="chunk")}


def measure(rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Of each member and batch, by memory: median tokens a second, and how many times the plain one's of its chunk."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for member in MEMBERS:
        for batch in BATCHES:
            ops = {name: contender(m, batch=batch, tokens=TOKENS) for name, m in memories(member).items()}
            seconds, _ = timed(ops, rounds)
            rows = {}
            for name, times in seconds.items():
                rows[name] = {"tokens_per_second": round(batch * TOKENS / statistics.median(times))}
                plain = name.split("/")[0].replace("local", "chunk")
                if plain != name and plain in seconds:
                    rows[name]["times_the_plain"] = round(ratio(seconds[plain], times), 2)
            found[f"{member}, B={batch} T={TOKENS}"] = rows
    return found


def main(words: Sequence[str] | None = None) -> int:
    """What the command line asks for; its exit status."""
    return command("benchmarks.shards", lambda: _bench(_parser().parse_args(words)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.shards --json docs/results/shards_cpu.json",
    )
    add_version(parser)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds a shape (default 5)")
    parser.add_argument("--json", type=Path, default=Path("runs/bench_shards.json"), help="where the figures go")
    return parser


def _bench(arguments: argparse.Namespace) -> int:
    flush_denormals()
    keep_freed_memory()
    shapes = measure(arguments.rounds)
    for title, rows in shapes.items():
        table = Table("memory", "tokens/s", "times the plain", title=f"{title}, float32, {HEADS} heads of {HEAD_DIM}")
        for name, of in rows.items():
            table.add_row(name, f"{of['tokens_per_second']:,}", str(of.get("times_the_plain", "")))
        Console(width=100).print(table)
    report = {
        **made_by("shards"),
        "shapes": shapes,
    }
    write(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
