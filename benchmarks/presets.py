"""Time every preset's memory beside omeganet's, and packed documents beside one: forward and backward, in turn.

Of a preset with Newton-Schulz the share of the writes is timed apart (the same rule with ns_steps = 0), because the
iteration is an addition that the preset asks for. Figures are medians over rounds, of seconds and of the ratios within
a round. Documents: few and many in a sequence; each one's last chunk is filled up, which is most of what packing costs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from atlas_megatron.config import MemoryConfig
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.parallel.device import flush_denormals, keep_freed_memory
from benchmarks.contenders import contender
from benchmarks.memory import timed
from benchmarks.report import made_by, write

HEADS, HEAD_DIM, TOKENS, BATCH = 6, 64, 1024, 1
# Lengths in a sequence of 1,024 tokens, and four times as long.
SHORT = {"few": (300, 45, 679), "many": (40, 300, 5, 128, 200, 63, 64, 224)}
LONG = {"few long": (1207, 180, 2709), "many long": (167, 1200, 20, 512, 800, 252, 256, 889)}
DOCUMENTS = SHORT | LONG


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the rounds' ratios: what slows a machine down slows both."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def measure(rounds: int) -> dict[str, dict]:
    """Median seconds of every preset, its ratio to omeganet's, and that of packed documents to one."""
    base = MemoryConfig(heads=HEADS, head_dim=HEAD_DIM)
    members = {name: replace(base, **fields) for name, fields in PRESETS.items()}
    without = {f"{n}, ns_steps=0": replace(m, ns_steps=0) for n, m in members.items() if m.ns_steps}
    members |= without
    # Once a chunk, as the CPU configs write.
    members = {n: replace(m, ns_period=m.chunk) if m.ns_steps else m for n, m in members.items()}
    whole, _ = timed({name: contender(memory, batch=BATCH, tokens=TOKENS) for name, memory in members.items()}, rounds)
    packed: dict[str, dict[str, float]] = {kind: {} for kind in DOCUMENTS}
    for name, memory in members.items():
        if memory.kernel != "lifted":
            continue
        for kind, lengths in DOCUMENTS.items():
            tokens = sum(lengths)
            positions = torch.cat([torch.arange(n) for n in lengths]).expand(BATCH, -1)
            shape = {"batch": BATCH, "tokens": tokens}
            pair = {"one": contender(memory, **shape), "packed": contender(memory, positions, **shape)}
            seconds, _ = timed(pair, rounds)
            packed[kind][name] = ratio(seconds["packed"], seconds["one"])
    return {
        "seconds": {name: statistics.median(times) for name, times in whole.items()},
        "of_omeganet": {name: ratio(times, whole["omeganet"]) for name, times in whole.items()},
        "packed_over_whole": packed,
    }


def main(words: Sequence[str] | None = None) -> int:
    """What the command line asks for; its exit status, of which 1 is a check that failed."""
    return command("benchmarks.presets", lambda: _bench(_parser().parse_args(words)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.presets --rounds 9 --json docs/results/presets_cpu.json",
    )
    add_version(parser)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--json", type=Path, default=Path("runs/bench_presets.json"), help="where the figures go")
    return parser


def _bench(arguments: argparse.Namespace) -> int:
    flush_denormals()
    keep_freed_memory()
    measured = measure(arguments.rounds)
    shape = f"T={TOKENS} B={BATCH}, {HEADS} heads of {HEAD_DIM}, float32"
    table = Table("preset: forward + backward", "ms", "of omeganet", *DOCUMENTS, title=shape)
    for name, seconds in measured["seconds"].items():
        packed = [measured["packed_over_whole"][kind].get(name) for kind in DOCUMENTS]
        cost = [f"x {ratio:.2f}" if ratio else "-" for ratio in packed]
        table.add_row(name, f"{1e3 * seconds:,.0f}", f"{measured['of_omeganet'][name]:.2f}", *cost)
    Console(width=120).print(table)
    report = {
        **made_by("presets"),
        "shape": shape,
        "documents": DOCUMENTS,
        **measured,
    }
    write(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
