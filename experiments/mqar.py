"""Multi-query associative recall: accuracy against the size of the state, for each sequence mixer.

After zoology (Arora et al. 2023, arXiv 2312.04927): key-value pairs, then every key once more after a gap drawn from a
power law. Loss and accuracy are taken at those queries alone, and every sequence is fresh. A model has two layers of
the mixer, 64 wide, without MLPs, with tied embeddings. One training run mixes the numbers of pairs; each is measured
apart. A mixer's state is what it carries past a token: see state_floats in training.py.

The task is small, so that two CPU cores train all mixers in about half an hour. Zoology has a vocabulary of 8192, at
least 100,000 sequences of 64 to 512 tokens over 64 epochs, and the best of four learning rates. Here:

    vocabulary       256; with 8192, atlas, omeganet and titans answered 1 % or less after 600 steps
    sequences        four tokens for each pair, so that they are dense in queries
    pairs            from one up, which lets the recurrent mixers start to learn sooner
    learning rates   the better of two
    tokens           about a million

Attention, full and sliding, has rotary positions but lacks the short convolution that the others have. It has to learn
to look one token back, and gets three times the steps. So this shows what is learned soon. It is only a lower bound of
what a state can hold.

--generator zoology draws the sequences as zoology does (evaluate/zoology.py) in these sizes; --passes 2 tells the pairs
twice, in longer ones. The default is our generator (evaluate/synthetic.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from statistics import mean

from matplotlib import pyplot

from atlas_megatron.evaluate import zoology
from atlas_megatron.evaluate.synthetic import Batch, Task, mqar
from experiments.shared import record, training
from experiments.shared.training import Schedule


@dataclass(frozen=True)
class Grid:
    """What is trained, on which sequences.

    sizes: of each mixer the head sizes of a memory, or the windows of attention (0: neither). lengths: tokens of a
    sequence by its pairs. schedule.batch: sequences of the longest length; a batch of shorter ones has as many tokens.
    rates: each is trained, and the best one counts. longer: the mixers that take several times the schedule's steps.
    generator: who draws the sequences. passes: how often zoology tells the pairs.
    """

    sizes: dict[str, tuple[int, ...]]
    lengths: dict[int, int]
    shown: tuple[int, ...]  # numbers of pairs, of those in `lengths`
    vocabulary: int
    schedule: Schedule
    rates: tuple[float, ...]
    longer: dict[str, int]
    seeds: tuple[int, ...] = (0,)
    generator: str = record.OURS
    passes: int = 1

    @property
    def tokens(self) -> int:
        return max(self.lengths.values())

    def task(self, generate: Callable[[int, int], Batch]) -> Task:
        return Task(generate, self.vocabulary, self.tokens)


FULL = Grid(
    sizes={
        "attention": (0,),
        "sliding window": (8, 32),
        "gated delta": (8, 32),
        "gated delta, our starts": (8, 32),
        "delta": (8, 32),
        "titans": (8, 16),
        "omeganet": (8, 16),
        "atlas": (8, 16),
        "atlas, a write every 8": (8, 16),
        "atlas, starts as drawn": (8, 16),
    },
    lengths={1: 4, 2: 8, 4: 16, 8: 32, 16: 64},
    shown=(4, 8, 16),
    vocabulary=256,
    schedule=Schedule(steps=1000, batch=16, lr=0.0, warmup=50),
    rates=(1e-2, 2e-2),
    longer={"attention": 3, "sliding window": 3},
)
QUICK = Grid(
    sizes={"atlas": (8,), "delta": (8,), "gated delta": (8,), "sliding window": (8,), "attention": (0,)},
    lengths={1: 8, 2: 16, 4: 32},
    shown=(2, 4),
    vocabulary=128,
    schedule=Schedule(steps=12, batch=8, lr=0.0, warmup=3, evaluated=2),
    rates=(5e-3, 1e-2),
    longer={"attention": 2},
)


def sequences(seed: int, count: int, grid: Grid, pairs: int) -> Batch:
    """Sequences with this number of pairs, with as many tokens together as `count` of the longest."""
    tokens = grid.lengths[pairs]
    count = count * grid.tokens // tokens
    if grid.generator == zoology.SOURCE:
        return zoology.mqar(seed, count, tokens, pairs, grid.vocabulary, passes=grid.passes)
    return mqar(seed, count, tokens, pairs, grid.vocabulary)


def drawn_by(grid: Grid, generator: str, passes: int) -> Grid:
    """The grid with another generator. Where pairs are told twice, sequences are twice as long."""
    lengths = {pairs: tokens * passes for pairs, tokens in grid.lengths.items()}
    return replace(grid, lengths=lengths, generator=generator, passes=passes)


def mixed(seed: int, count: int, grid: Grid) -> Batch:
    """Batches with each number of pairs in turn."""
    return sequences(seed, count, grid, list(grid.lengths)[seed % len(grid.lengths)])


def measure(grid: Grid, mixer: str, size: int, seed: int, schedule: Schedule) -> record.Cell:
    config = training.config_of(mixer, size, grid.tokens, grid.vocabulary, mlp=False)
    measured = {str(pairs): grid.task(partial(sequences, grid=grid, pairs=pairs)) for pairs in grid.lengths}
    return training.train_and_measure(config, grid.task(partial(mixed, grid=grid)), schedule, seed, measured)


def cell_name(mixer: str, size: int, rate: float, seed: int) -> str:
    return f"{mixer}, {f'size {size}, ' if size else ''}rate {rate:g}, seed {seed}"


def train_all(results: record.Record, grid: Grid) -> None:
    jobs = {}
    for mixer, sizes in grid.sizes.items():
        steps = grid.schedule.steps * grid.longer.get(mixer, 1)
        for size, rate, seed in product(sizes, grid.rates, grid.seeds):
            schedule = replace(grid.schedule, steps=steps, lr=rate)
            jobs[cell_name(mixer, size, rate, seed)] = partial(measure, grid, mixer, size, seed, schedule)
    record.side_by_side(results, jobs, fresh=False)


@dataclass(frozen=True)
class Found:
    """A mixer of one size at its best rate: numbers of state, and accuracy by the number of pairs (mean of seeds)."""

    state: int
    rate: float
    accuracy: dict[int, float]


def found(results: record.Record, grid: Grid, mixer: str, size: int) -> Found:
    """The rate with the highest mean accuracy over the shown numbers of pairs; a run that diverged counts as zero."""
    tried = []
    for rate in grid.rates:
        cells = [results.cells[cell_name(mixer, size, rate, seed)] for seed in grid.seeds]
        scores = {n: mean(cell["measured"][str(n)]["accuracy"] or 0.0 for cell in cells) for n in grid.shown}
        tried.append(Found(cells[0]["state_floats"], rate, scores))
    return max(tried, key=lambda one: mean(one.accuracy.values()))


def draw(results: record.Record, grid: Grid) -> None:
    with pyplot.style.context(record.STYLE):
        figure, panels = pyplot.subplots(
            1, len(grid.shown), figsize=(4 * len(grid.shown), 4), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, pairs in zip(panels[0], grid.shown, strict=True):
            for mixer, sizes in grid.sizes.items():
                points = [found(results, grid, mixer, size) for size in sizes]
                states, scores = [p.state for p in points], [p.accuracy[pairs] for p in points]
                plain, suffix = training.plain_of(mixer)
                colour, style = f"C{list(grid.sizes).index(plain)}", "--" if suffix else "-"
                axes.plot(states, scores, style, marker="o", markersize=4, color=colour, label=mixer)
            axes.axhline(1 / pairs, color="grey", linestyle=":", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_ylim(-0.02, 1.02)
            axes.set_xlabel("state (numbers, all layers)")
            axes.set_title(f"{pairs} pairs in {grid.lengths[pairs]} tokens", fontsize="medium")
        panels[0][0].set_ylabel("accuracy (dotted: any value of the context)")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper")
        results.save_figure(figure)


def describe(results: record.Record, grid: Grid, observed: Sequence[str]) -> None:
    """The page: every mixer of every size at its best learning rate."""
    rows = []
    for mixer, sizes in grid.sizes.items():
        for size in sizes:
            best = found(results, grid, mixer, size)
            shown = (f"{100 * score:.1f}" for score in best.accuracy.values())
            rows.append((mixer, str(size or ""), f"{best.state:,}", f"{best.rate:g}", *shown))
    rows.append(("any value of the context", "", "", "", *(f"{100 / pairs:.1f}" for pairs in grid.shown)))
    head = ("mixer", "head size or window", "numbers of state", "learning rate")
    head += tuple(f"{n} pairs in {grid.lengths[n]} tokens, %" for n in grid.shown)
    drawn = "by this project's generator" if grid.generator == record.OURS else "as in zoology's repository"
    told = f" The pairs are told {grid.passes} times." if grid.passes > 1 else ""
    results.write_text(
        "Multi-query associative recall",
        f"Accuracy in percent of small models with each mixer, {record.seeds_said(grid.seeds)}. Each trains for "
        f"{grid.schedule.steps:,} steps of {grid.schedule.batch * grid.tokens:,} tokens. "
        f"{record.longer_said(grid.longer)} The learning rate is the best one of "
        f"{record.listed(f'{rate:g}' for rate in grid.rates)}. Sequences are drawn {drawn}, from a vocabulary of "
        f"{grid.vocabulary}.{told} The last row names any value of the context.",
        [record.Table(head, rows)],
        observed,
    )


# Of the full grid; the numbers behind it are in the JSON.
OBSERVED: tuple[str, ...] = ()


def main(words: Sequence[str] | None = None) -> int:
    asked = record.options("mqar", __doc__, words, generators=[zoology.SOURCE], passes=True)
    grid = drawn_by(QUICK if asked.quick else FULL, asked.generator, asked.passes)

    def experiment() -> None:
        # Sizes, rates and seeds are in the cells' names. They are no settings of the whole, so the grid may grow.
        shared = {name: value for name, value in asdict(grid).items() if name not in ("sizes", "rates", "seeds")}
        results = record.Record("mqar", asked, {**shared, **training.SETTINGS})
        train_all(results, grid)
        draw(results, grid)
        describe(results, grid, OBSERVED if grid == FULL else ())

    return record.run("mqar", experiment)


if __name__ == "__main__":
    sys.exit(main())
