"""The speeds that the kernels are to reach on one H200, and how far a run of `benchmarks.gpu` is from each.

`python -m benchmarks.goals` prints the table of kernels/README.md: every goal, the bound that follows from the
committed kernels/estimates.json by arithmetic (`benchmarks.static_times`), and what the committed run measured. A bound
leaves out all waiting: it says what is out of reach, not what will be reached.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.lines import Lines, figures

ROOT = Path(__file__).resolve().parents[1]
ESTIMATES = ROOT / "kernels" / "estimates.json"
MEASURED = ROOT / "docs" / "results" / "gpu"
# FLOPs a second of one H200's tensor cores in bfloat16, as it is sold, and of a large product, as it was measured.
PEAK, PRODUCT = 989e12, 751e12
Sections = Mapping[str, Any]
Estimates = Mapping[str, Any]

# Sections of the report that hold the figures.
NEWTON_SCHULZ = "Newton-Schulz, 8192 matrices, forward"
MEMORY_OP = "memory op, B=8 T=4096, 16 heads of 64, forward and backward"
TRAINING = "training"
PEERS = "peers, beside omeganet's op"
REST = "torch.compile, edges, ncu"


@dataclass(frozen=True)
class Goal:
    """what is measured by figure(sections), which raises KeyError where it was not; bound: at least, or at most.

    estimate: the bound by arithmetic, of `ops` of kernels/estimates.json; None where there is none. quotient: it is one
    of two bounds, which bounds nothing.
    """

    what: str
    bound: float
    figure: Callable[[Sections], float]
    at_most: bool = False
    estimate: Callable[[Estimates], float] | None = None
    quotient: bool = False

    def row(self, sections: Sections, estimates: Estimates | None = None) -> str:
        """The goal, its bound where there are estimates, the figure of this run and whether it reaches the goal."""
        words = f"| {self.what} | {'at most' if self.at_most else 'at least'} {number(self.bound)} "
        if estimates is not None:
            # A time is at least so long, a rate at most so high.
            side = "of two bounds:" if self.quotient else "at least" if self.at_most else "at most"
            words += f"| {side} {number(self.estimate(estimates))} " if self.estimate else "| "
        try:
            found = self.figure(sections)
        except KeyError:
            return words + "| not run | |"
        reached = found <= self.bound if self.at_most else found >= self.bound
        return words + f"| {number(found)} | {found / self.bound:.2f} ({'reached' if reached else 'missed'}) |"


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


def seconds_at_least(op: str, estimates: Estimates) -> float:
    """Of an op's forward and backward: what the GPU or the host takes, whichever is longer."""
    return float(max(estimates[op]["gpu_seconds"], estimates[op]["host_seconds"]))


def ratio_of_bounds(one: str, other: str, estimates: Estimates) -> float:
    """The bound of one op's seconds in that of another of as many tokens. It says where work is missing, no limit."""
    return seconds_at_least(one, estimates) / seconds_at_least(other, estimates)


def tokens_a_second(op: str, tokens: int, layers: int, estimates: Estimates) -> float:
    """Of a model of so many layers, of which nothing takes time but the memory op."""
    return tokens / (layers * seconds_at_least(op, estimates))


def mfu_at_most(estimates: Estimates) -> float:
    """Of atlas-340m with a write a chunk: 32,768 tokens take 24 ops, and its other products the measured rate."""
    from atlas_megatron.config import load
    from atlas_megatron.model.build import flops_per_token

    flops = flops_per_token(load(ROOT / "configs" / "atlas-340m.toml", ["memory.ns_period=64"]))
    tokens = 8 * 4096
    seconds = 24 * seconds_at_least(ONCE, estimates) + tokens * (flops.training - flops.inner) / PRODUCT
    return tokens * flops.training / seconds / PEAK


def share_at_most(size: str, estimates: Estimates) -> float:
    m, n = map(int, size.split(" x "))
    useful = 8192 * 5 * (4.0 * m * m * n + 2 * m**3)
    return useful / seconds_at_least(f"{NS} {size}", estimates) / PRODUCT


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
ONCE, OMEGANET_OP = "once, B=8 T=4096", "omeganet, B=8 T=4096"
# Of the first run of EXACT, 8 sequences of 1,024 tokens; of the others no op is bounded.
OF_EXACT = {next(iter(EXACT)): partial(tokens_a_second, "exact, B=8 T=1024", 8192, 12)}
GOALS = (
    *(
        Goal(f"{run}, T=1024: tokens/s", r, partial(trained, run, "tokens_per_second"), estimate=OF_EXACT.get(run))
        for run, r in EXACT.items()
    ),
    *(
        Goal(
            f"{NS} {s}: share of the matmul rate", 0.5, partial(newton_schulz, NEWTON_SCHULZ, s, SHARE),
            estimate=partial(share_at_most, s),
        )
        for s in SIZES
    ),
    *(Goal(f"{NS} {s}: times torch.compile", 3, partial(newton_schulz, REST, s, COMPILED)) for s in SIZES),
    Goal(
        "omeganet's op: times Gated DeltaNet's seconds", 6, partial(of_peers, GATED_DELTA, OMEGANET, GATED_DELTA),
        at_most=True,
    ),
    Goal("titans-pytorch: times the seconds of omeganet's op", 3, partial(of_peers, TITANS, TITANS, OMEGANET)),
    Goal(
        "ATLAS, a write a chunk: times omeganet's seconds", 1.5,
        partial(seconds_of, "atlas, a write a chunk: triton", OMEGANET), at_most=True,
        estimate=partial(ratio_of_bounds, ONCE, OMEGANET_OP), quotient=True,
    ),
    Goal(f"{CHUNKWISE}: MFU, inner loop counted", 0.35, partial(trained, CHUNKWISE, "mfu"), estimate=mfu_at_most),
    Goal(f"{CHUNKWISE}: peak memory of 64K tokens a step, GB", 60, partial(gigabytes, CHUNKWISE), at_most=True),
    Goal(
        "atlas-340m, 32K x 1: times the seconds a token of 4K x 8", 1.5, slower_for_length, at_most=True,
        estimate=partial(ratio_of_bounds, "once, B=1 T=32768", ONCE), quotient=True,
    ),
)  # fmt: skip


def table(sections: Sections, estimates: Estimates | None = None) -> str:
    """Every goal with what this run measured; with estimates, also with the bounds that follow from them."""
    bound = [] if estimates is None else ["bound by arithmetic"]
    head = ["what", "goal on one H200", *bound, "measured", "measured / goal"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*rows, *(goal.row(sections, estimates) for goal in GOALS)]) + "\n"


def committed() -> str:
    """The table of the committed runs, of each figure the newest, and of the committed bounds."""
    sections = figures(Lines(MEASURED).read())
    return table(sections, json.loads(ESTIMATES.read_text(encoding="utf-8"))["ops"])


if __name__ == "__main__":
    sys.stdout.write(committed())
