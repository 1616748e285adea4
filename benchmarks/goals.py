"""The speeds that the kernels are to reach on one H200, and how far a run of `benchmarks.gpu` is from each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

Sections = Mapping[str, Any]

# Sections of the report that hold the figures.
NEWTON_SCHULZ = "Newton-Schulz, 8192 matrices, forward"
MEMORY_OP = "memory op, B=8 T=4096, 16 heads of 64, forward and backward"
TRAINING = "training"
PEERS = "peers, beside omeganet's op"
REST = "torch.compile, edges, ncu"


@dataclass(frozen=True)
class Goal:
    """what is measured by figure(sections), which raises KeyError where it was not; bound: at least, or at most."""

    what: str
    bound: float
    figure: Callable[[Sections], float]
    at_most: bool = False

    def row(self, sections: Sections) -> str:
        """The goal, the figure of this run and whether it reaches the goal, as a row of a table."""
        words = f"| {self.what} | {'at most' if self.at_most else 'at least'} {number(self.bound)} "
        try:
            found = self.figure(sections)
        except KeyError:
            return words + "| not run | |"
        reached = found <= self.bound if self.at_most else found >= self.bound
        return words + f"| {number(found)} | {'reached' if reached else f'{found / self.bound:.2f} of it'} |"


def number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def trained(run: str, key: str, sections: Sections) -> float:
    return float(sections[TRAINING][run][key])


def newton_schulz(section: str, size: str, key: str, sections: Sections) -> float:
    return float(sections[section][size][key])


def seconds_of(one: str, other: str, sections: Sections) -> float:
    """Seconds of one memory op in those of another."""
    seconds = sections[MEMORY_OP]["seconds"]
    return float(seconds[one] / seconds[other])


def of_peers(peer: str, one: str, other: str, sections: Sections) -> float:
    """The same with a peer's, from the rounds that both ran in."""
    seconds = sections[PEERS][peer]["seconds"]
    return float(seconds[one] / seconds[other])


def slower_for_length(sections: Sections) -> float:
    return trained("atlas-340m, 4K x 8", "tokens_per_second", sections) / trained(
        "atlas-340m, 32K x 1", "tokens_per_second", sections
    )


def gigabytes(run: str, sections: Sections) -> float:
    return trained(run, "peak_memory_bytes", sections) / 1e9


EXACT = {
    "exact ATLAS, 12 layers, 768 wide, F = V": 31_500,
    "exact ATLAS, 12 layers, 768 wide, F = 2 V": 18_800,
    "exact ATLAS, 24 layers, 2048 wide, F = V": 5_380,
    "exact ATLAS, 24 layers, 2048 wide, F = 2 V": 3_080,
}
OMEGANET, GATED_DELTA, TITANS = "omeganet: triton", "flash-linear-attention Gated DeltaNet", "titans-pytorch"
CHUNKWISE = "atlas-340m, a write a chunk"
NS, SHARE, COMPILED = "Newton-Schulz", "share_of_matmul_rate", "times_torch_compile"
SIZES = ("64 x 64", "64 x 256")
GOALS = (
    *(Goal(f"{run}, T=1024: tokens/s", r, partial(trained, run, "tokens_per_second")) for run, r in EXACT.items()),
    *(Goal(f"{NS} {s}: share of the matmul rate", 0.5, partial(newton_schulz, NEWTON_SCHULZ, s, SHARE)) for s in SIZES),
    *(Goal(f"{NS} {s}: times torch.compile", 3, partial(newton_schulz, REST, s, COMPILED)) for s in SIZES),
    Goal(
        "omeganet's op: times Gated DeltaNet's seconds", 6, partial(of_peers, GATED_DELTA, OMEGANET, GATED_DELTA),
        at_most=True,
    ),
    Goal("titans-pytorch: times the seconds of omeganet's op", 3, partial(of_peers, TITANS, TITANS, OMEGANET)),
    Goal(
        "ATLAS, a write a chunk: times omeganet's seconds", 1.5,
        partial(seconds_of, "atlas, a write a chunk: triton", OMEGANET), at_most=True,
    ),
    Goal(f"{CHUNKWISE}: MFU, inner loop counted", 0.35, partial(trained, CHUNKWISE, "mfu")),
    Goal(f"{CHUNKWISE}: peak memory of 64K tokens a step, GB", 60, partial(gigabytes, CHUNKWISE), at_most=True),
    Goal("atlas-340m, 32K x 1: times the seconds a token of 4K x 8", 1.5, slower_for_length, at_most=True),
)  # fmt: skip


def table(sections: Sections) -> str:
    """Every goal with what this run measured."""
    rows = ["| what | goal on one H200 | measured | |", "|---|---|---|---|", *(goal.row(sections) for goal in GOALS)]
    return "\n".join(rows) + "\n"
