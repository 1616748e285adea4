"""The six tasks of MAD (Poli et al. 2024, arXiv 2403.17844), generated here, for each sequence mixer.

In-context recall, fuzzy and noisy in-context recall, selective copying, compression, memorisation: see synthetic.py. A
model has two blocks of a mixer and a SwiGLU MLP, 64 wide. Loss and accuracy are taken where an answer is due.

MAD trains models 128 wide for 200 epochs of 12,800 sequences of 128 tokens, and reports the best of six settings of
AdamW. Here a CPU core trains each model for a few hundred steps at one learning rate. Sequences are shorter, and none
comes twice. So most tasks are still being learned. Compare the mixers with each other, as to what they learn soon, and
not with MAD's tables. Attention, full and sliding, lacks the short convolution that the other mixers have, and gets
three times the steps.

--generator mad draws the sequences, and counts the accuracy, as MAD's repository does (evaluate/mad.py) in these
sizes. The default is our generator (evaluate/synthetic.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from statistics import mean

import numpy
from matplotlib import pyplot

from atlas_megatron.evaluate import mad
from atlas_megatron.evaluate.synthetic import Task, mad_tasks
from experiments.shared import record, training
from experiments.shared.training import Schedule


@dataclass(frozen=True)
class Grid:
    """What is trained, on which tasks.

    sizes: of each mixer the head size of a memory, or the window of attention (0: neither). longer: the mixers that
    take several times the schedule's steps. generator: who draws the sequences.
    """

    sizes: dict[str, int]
    tokens: int
    short: int  # of compression and memorisation
    copied: int  # tokens of selective copying
    schedule: Schedule
    longer: dict[str, int]
    seeds: tuple[int, ...] = (0,)
    generator: str = record.OURS

    def tasks(self, *, training: bool = False) -> dict[str, Task]:
        """The tasks by name, as they are measured; with `training`, as they are learned."""
        if self.generator == mad.SOURCE:
            return mad.tasks(self.tokens, self.short, self.copied, training)
        return mad_tasks(self.tokens, self.short, self.copied)


FULL = Grid(
    sizes={
        "attention": 0,
        "sliding window": 16,
        "gated delta": 8,
        "gated delta, our starts": 8,
        "delta": 8,
        "titans": 8,
        "omeganet": 8,
        "atlas": 8,
        "atlas, a write every 8": 8,
    },
    tokens=64,
    short=32,
    copied=8,
    schedule=Schedule(steps=400, batch=16, lr=3e-3, warmup=40, evaluated=16),
    longer={"attention": 3, "sliding window": 3},
)
QUICK = Grid(
    sizes={"attention": 0, "delta": 8, "atlas": 8},
    tokens=32,
    short=16,
    copied=4,
    schedule=Schedule(steps=6, batch=8, lr=3e-3, warmup=2, evaluated=2),
    longer={"attention": 2},
)


def measure(grid: Grid, mixer: str, name: str, seed: int, schedule: Schedule) -> record.Cell:
    task = grid.tasks(training=True)[name]
    config = training.config_of(mixer, grid.sizes[mixer], task.tokens, task.vocabulary, mlp=True)
    return training.train_and_measure(config, task, schedule, seed, {name: grid.tasks()[name]})


def train_all(results: record.Record, grid: Grid) -> None:
    jobs = {}
    for task, mixer, seed in product(grid.tasks(), grid.sizes, grid.seeds):
        schedule = replace(grid.schedule, steps=grid.schedule.steps * grid.longer.get(mixer, 1))
        jobs[cell_name(mixer, task, seed)] = partial(measure, grid, mixer, task, seed, schedule)
    record.side_by_side(results, jobs, fresh=False)


def cell_name(mixer: str, task: str, seed: int) -> str:
    return f"{task}, {mixer}, seed {seed}"


def accuracies(results: record.Record, grid: Grid, mixer: str, task: str) -> list[float]:
    """The accuracy of each seed that did not diverge."""
    cells = [results.cells[cell_name(mixer, task, seed)] for seed in grid.seeds]
    found = [cell["measured"][task]["accuracy"] for cell in cells]
    return [accuracy for accuracy in found if accuracy is not None]


def draw(results: record.Record, grid: Grid) -> None:
    with pyplot.style.context(record.STYLE):
        figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
        tasks, width = list(grid.tasks()), 0.8 / len(grid.sizes)
        for place, mixer in enumerate(grid.sizes):
            scores = [accuracies(results, grid, mixer, task) for task in tasks]
            heights = [mean(score) if score else 0.0 for score in scores]
            left = numpy.arange(len(tasks)) + (place - (len(grid.sizes) - 1) / 2) * width
            plain, suffix = training.plain_of(mixer)
            colour, hatch = f"C{list(grid.sizes).index(plain)}", "////" if suffix else ""
            axes.bar(left, heights, width, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=mixer)
        axes.set_xticks(range(len(tasks)), tasks)
        axes.set_ylim(0, 1)
        axes.set_ylabel("accuracy")
        axes.set_title("MAD's tasks", fontsize="medium")
        figure.legend(loc="outside right upper")
        results.save_figure(figure)


def describe(results: record.Record, grid: Grid, observed: Sequence[str]) -> None:
    """The page: every mixer's accuracy on every task."""
    rows = []
    for mixer in grid.sizes:
        scores = [accuracies(results, grid, mixer, task) for task in grid.tasks()]
        shown = [f"{100 * mean(score):.1f}" if score else "diverged" for score in scores]
        state = results.cells[cell_name(mixer, "in-context recall", grid.seeds[0])]["state_floats"]
        rows.append((mixer, f"{state:,}", *shown))
    schedule = grid.schedule
    counted = "the mean over the classes, as MAD counts it" if grid.generator == mad.SOURCE else "of all answers"
    drawn = "as in MAD's repository" if grid.generator == mad.SOURCE else "by this project's generator"
    results.write_text(
        "MAD's synthetic tasks",
        f"Accuracy in percent ({counted}) of small models with each mixer on MAD's six tasks, "
        f"{record.seeds_said(grid.seeds)}. Each trains for {schedule.steps} steps of {schedule.batch} sequences at a "
        f"learning rate of {schedule.lr:g}. {record.longer_said(grid.longer)} Sequences have {grid.tokens} tokens, "
        f"and {grid.short} in compression and memorisation. They are drawn {drawn}.",
        [record.Table(("mixer", "numbers of state", *grid.tasks()), rows)],
        observed,
    )


# Of the full grid; the numbers behind it are in the JSON.
OBSERVED: tuple[str, ...] = ()


def main(words: Sequence[str] | None = None) -> int:
    asked = record.options("mad", __doc__, words, generators=[mad.SOURCE])
    grid = replace(QUICK if asked.quick else FULL, generator=asked.generator)

    def experiment() -> None:
        # Sizes and seeds are in the cells' names. They are no settings of the whole, so the grid may grow.
        shared = {name: value for name, value in asdict(grid).items() if name not in ("sizes", "seeds")}
        results = record.Record("mad", asked, {**shared, **training.SETTINGS})
        train_all(results, grid)
        draw(results, grid)
        describe(results, grid, OBSERVED if grid == FULL else ())

    return record.run("mad", experiment)


if __name__ == "__main__":
    sys.exit(main())
