"""Multi-query associative recall: accuracy against the size of the state, for each sequence mixer.

The protocol of zoology (Arora et al. 2023, arXiv 2312.04927) on sequences that a CPU can train on: vocabulary 8192,
key value pairs, then every key once more after a gap drawn from a power law; the loss and the accuracy are at those
queries alone. Two layers of the mixer, 64 wide, without MLPs, tied embeddings. One training run mixes the numbers of
pairs, each is measured apart. The state of a mixer is what it carries past a token: see state_floats in training.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

from matplotlib import pyplot

import record
import training
from synthetic import Batch, Task, mqar
from training import Schedule


@dataclass(frozen=True)
class Grid:
    """What is trained: sizes a mixer (head size of a memory, window of attention, 0 where it has none)."""

    sizes: dict[str, tuple[int, ...]]
    pairs: tuple[int, ...]
    tokens: int
    vocabulary: int
    schedule: Schedule
    seeds: tuple[int, ...] = (0,)


FULL = Grid(
    sizes={
        "atlas": (8, 16),
        "omeganet": (8, 16),
        "titans": (8, 16),
        "delta": (8, 16, 32),
        "gated delta": (8, 16, 32),
        "sliding window": (8, 32),
        "attention": (0,),
    },
    pairs=(4, 8, 16),
    tokens=64,
    vocabulary=8192,
    schedule=Schedule(steps=1500, batch=32, lr=1e-2, warmup=50),
)
QUICK = Grid(
    sizes={"atlas": (8,), "delta": (8,), "gated delta": (8,), "sliding window": (8,), "attention": (0,)},
    pairs=(2, 4),
    tokens=32,
    vocabulary=128,
    schedule=Schedule(steps=12, batch=8, lr=5e-3, warmup=3, evaluated=2),
)


def mixed(seed: int, count: int, grid: Grid) -> Batch:
    """Batches with each number of pairs in turn."""
    return mqar(seed, count, grid.tokens, grid.pairs[seed % len(grid.pairs)], grid.vocabulary)


def measure(grid: Grid, mixer: str, size: int, seed: int) -> record.Cell:
    config = training.config_of(mixer, size, grid.tokens, grid.vocabulary, mlp=False)
    task = Task(partial(mixed, grid=grid), grid.vocabulary, grid.tokens)
    measured = {
        str(pairs): Task(
            partial(mqar, tokens=grid.tokens, pairs=pairs, vocabulary=grid.vocabulary), grid.vocabulary, grid.tokens
        )
        for pairs in grid.pairs
    }
    return training.train_and_measure(config, task, grid.schedule, seed, measured)


def cell_name(mixer: str, size: int, seed: int) -> str:
    return f"{mixer}, {f'size {size}, ' if size else ''}seed {seed}"


def accuracies(results: record.Record, grid: Grid, mixer: str, size: int, pairs: int) -> list[float]:
    """Of each seed that did not diverge."""
    cells = [results.cells[cell_name(mixer, size, seed)] for seed in grid.seeds]
    found = [cell["measured"][str(pairs)]["accuracy"] for cell in cells]
    return [accuracy for accuracy in found if accuracy is not None]


def floats(results: record.Record, grid: Grid, mixer: str, size: int) -> int:
    return results.cells[cell_name(mixer, size, grid.seeds[0])]["state_floats"]


def draw(results: record.Record, grid: Grid) -> None:
    with pyplot.style.context(record.STYLE):
        figure, panels = pyplot.subplots(
            1, len(grid.pairs), figsize=(4 * len(grid.pairs), 4), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, pairs in zip(panels[0], grid.pairs, strict=True):
            for place, (mixer, sizes) in enumerate(grid.sizes.items()):
                points = [
                    (floats(results, grid, mixer, size), accuracy)
                    for size in sizes
                    for accuracy in accuracies(results, grid, mixer, size, pairs)
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=f"C{place}", label=mixer)
            axes.axhline(1 / pairs, color="grey", linestyle=":", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_ylim(-0.02, 1.02)
            axes.set_xlabel("state (numbers, all layers)")
            axes.set_title(f"{pairs} pairs", fontsize="medium")
        panels[0][0].set_ylabel("accuracy (dotted: any value of the context)")
        panels[0][-1].legend()
        results.save_figure(figure)


def describe(results: record.Record, grid: Grid) -> None:
    said = []
    for mixer, sizes in grid.sizes.items():
        for size in sizes:
            state = floats(results, grid, mixer, size)
            scores = [accuracies(results, grid, mixer, size, pairs) for pairs in grid.pairs]
            shown = [f"{100 * sum(s) / len(s):.1f}" if s else "diverged" for s in scores]
            said.append(f"{mixer}{f' {size}' if size else ''} ({state:,} numbers): {', '.join(shown)}")
    chance = ", ".join(f"{100 / pairs:.1f}" for pairs in grid.pairs)
    schedule = grid.schedule
    results.write_text(
        "Multi-query associative recall",
        [
            f"Accuracy in percent at {', '.join(map(str, grid.pairs))} pairs ({chance} by naming any value of the "
            f"context) after {schedule.steps} steps of {schedule.batch} sequences of {grid.tokens} tokens, vocabulary "
            f"{grid.vocabulary}. {'; '.join(said)}."
        ],
    )


def main(words: Sequence[str] | None = None) -> int:
    asked = record.options("mqar", __doc__, words)
    grid = QUICK if asked.quick else FULL

    def experiment() -> None:
        results = record.Record("mqar", asked, {**asdict(grid), **training.SETTINGS})
        for mixer, sizes in grid.sizes.items():
            for size in sizes:
                for seed in grid.seeds:
                    results.cell(cell_name(mixer, size, seed), partial(measure, grid, mixer, size, seed))
        draw(results, grid)
        describe(results, grid)

    return record.run("mqar", experiment)


if __name__ == "__main__":
    sys.exit(main())
