"""Recall against the length of the context: up to millions of tokens, read through each mixer's state.

A model has two blocks of a mixer and an MLP, 64 wide. It is trained on a language of facts and filler
(recall_language.py), in which facts are asked for all along. Training sequences have 128, then 256, 1,024, and last
4,096 tokens, with ever more filler. The loss is taken at the answers alone.

Then each model reads contexts of rising length. Eight facts lie anywhere in a context, and all of them are asked for
at its end. The state that a model keeps has a constant size, but for full attention. So attention reads no more than
65,536 tokens. Models train, and lengths are read, side by side: one to a core, each a process of one thread.

A memory forgets with every token, however slowly, and writes what is not worth it. Memories with a write gate
(memory.write_gate) learn under a budget to leave filler alone: they neither forget over it nor write it.

Every trained model is left in runs/long_context/NAME as a run's checkpoint. atlas-eval, atlas-generate and
tools/convert_hf.py take it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import nn

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.config import Config
from atlas_megatron.evaluate import recall
from atlas_megatron.evaluate.recall import Point, Recall
from atlas_megatron.evaluate.synthetic import Task
from atlas_megatron.inference.reader import open_reader
from atlas_megatron.mixers.base import in_mode
from atlas_megatron.mixers.memory import AtlasMixer
from atlas_megatron.model.build import num_params
from atlas_megatron.train import quieten
from atlas_megatron.training.write_budget import set_budget
from experiments.shared import recall_language as language
from experiments.shared import record, training
from experiments.shared.recall_language import Mix

RUNS = record.ROOT / "runs" / "long_context"
METRIC = "accuracy"
PATTERN_TOKENS = 4096  # model.seq_length: of the longest training sequences


@dataclass(frozen=True)
class Stage:
    """A share of the training steps, on sequences of one kind; every step has the same tokens."""

    share: float
    mix: Mix


STAGES = (
    Stage(0.5, Mix(128, filler=(0.0, 0.5), names=4)),
    Stage(0.2, Mix(256, filler=(0.3, 0.8), names=8)),
    Stage(0.2, Mix(1024, filler=(0.8, 0.98), names=12)),
    Stage(0.1, Mix(4096, filler=(0.95, 0.995), names=12)),
)


@dataclass(frozen=True)
class Contender:
    """What is trained and how far it reads.

    size: as in training.config_of. memory, delta: keys of those sections that differ from that configuration. budget:
    of the write gates, early and late. longer: times the steps. reach: tokens of the longest context that is read.
    """

    mixer: str
    size: int
    memory: dict[str, Any] = field(default_factory=dict)
    delta: dict[str, Any] = field(default_factory=dict)
    budget: tuple[float, float] = (0.0, 0.0)
    lr: float = 5e-3
    longer: int = 1
    grows: bool = False  # whether its state grows with the context
    reach: int = 10 * 2**20


# Writes inside a chunk do not see each other: with chunks of 64 a memory learned less than half as fast. All memories
# start with a slow decay. GATED: a token that writes nothing forgets nothing, and training asks for zeros. With a late
# budget of 0.5 omeganet's first layer writes at 1.2 % of the filler. With 4 it writes at 0.06 %, and answers as well.
MEMORY = {"chunk": 16, "window": 8, "alpha_start": 0.99999}
RAW = {"eta_sum": 4.0}  # without Newton-Schulz steps may be larger than the default
GATED, BUDGET = {"write_gate": True}, (0.1, 4.0)
# Newton-Schulz gives every write one size. Where a write is of many tokens, a fact among filler is a small part of it.
# With the defaults (0.9 and 0.5) ATLAS answers 9 % after 300 steps, with these 41 % (one seed, without a gate). Titans
# answers 40 to 43 %.
NARROW = {"theta_start": 0.3, "gamma_start": 0.1}
PERIOD = 4
ATLAS = {**MEMORY, **NARROW, "ns_period": PERIOD, "ns_step": "sum", "eta_start": training.ORTHOGONAL / PERIOD}
OMEGANET, TITANS = {**MEMORY, **RAW}, {"chunk": 16, "alpha_start": 0.99999, **RAW}
CONTENDERS = {
    "atlas": Contender("atlas", 16, {**ATLAS, **GATED}, budget=BUDGET),
    "omeganet": Contender("omeganet", 16, {**OMEGANET, **GATED}, budget=BUDGET),
    "titans": Contender("titans", 16, {**TITANS, **GATED}, budget=BUDGET),
    # Writes of ATLAS do not get smaller. With 0.99999 its gradients are not finite at the first 1,024-token sequences.
    "atlas, no gate": Contender("atlas", 16, {**ATLAS, "alpha_start": 0.999}, reach=2**20),
    "omeganet, no gate": Contender("omeganet", 16, OMEGANET, reach=2**20),
    "gated delta": Contender("gated delta", 16, lr=1e-2),
    "gated delta, our starts": Contender("gated delta", 16, delta=training.OUR_STARTS, lr=1e-2),
    "sliding window": Contender("sliding window", 64, lr=1e-2, longer=2),
    "attention": Contender("attention", 0, lr=1e-2, longer=2, grows=True),
}


@dataclass(frozen=True)
class Grid:
    """What is trained and read.

    steps, tokens: training from every seed, `steps` of `tokens` each. samples: how many contexts of each length a model
    reads. held: the longest context for a state that grows. all_seeds: beyond so many tokens only the first seed's
    models read.
    """

    contenders: tuple[str, ...]
    steps: int
    tokens: int
    samples: dict[int, int]
    held: int
    seeds: tuple[int, ...]
    all_seeds: int


FULL = Grid(
    contenders=tuple(CONTENDERS),
    steps=2000,
    tokens=2048,
    samples={1024: 16, 4096: 16, 16384: 8, 65536: 4, 262144: 2, 1048576: 2, 10485760: 1},
    held=65536,
    seeds=(1, 2, 3),
    all_seeds=2**20,
)
QUICK = Grid(("atlas", "gated delta", "attention"), 8, 1024, {512: 2, 2048: 2}, held=512, seeds=(1,), all_seeds=2048)


def config_of(contender: Contender, steps: int, seed: int) -> Config:
    config = training.config_of(contender.mixer, contender.size, PATTERN_TOKENS, language.VOCABULARY, mlp=True)
    early, late = contender.budget
    return replace(
        config,
        memory=replace(config.memory, **contender.memory),
        delta=replace(config.delta, **contender.delta),
        train=replace(
            config.train, steps=steps, warmup_steps=min(50, steps - 1), write_budget=early, late_write_budget=late
        ),
        run=replace(config.run, seed=seed),
    )


def train(name: str, seed: int, grid: Grid, runs: Path) -> record.Cell:
    """Train a contender and leave its checkpoint. The cell has the last training accuracy of each stage.

    Where a gradient is not finite, the cell says so and there is no checkpoint to read with.
    """
    contender, folder = CONTENDERS[name], folder_of(name, seed, runs)
    language.write_tokenizer(folder / "tokenizer")
    config = config_of(contender, grid.steps * contender.longer, seed)
    config = replace(
        config,
        run=replace(config.run, directory=str(folder)),
        data=replace(config.data, tokenizer=str(folder / "tokenizer")),
    )
    about = {
        "contender": name,
        "seed": seed,
        "parameters": num_params(config),
        "state_floats": training.state_floats(config),
        "settings": asdict(contender),
    }
    with training.one_process(config):
        asked = training.Asked(config, Task(language.batch, language.VOCABULARY, PATTERN_TOKENS))
        try:
            found = _train(asked, config, contender, grid.tokens)
        except ArithmeticError as error:
            return {"wrong": str(error), **about}
        checkpoint.save_weights(asked.model, config)
    return {**found, **about}


def _train(asked: training.Asked, config: Config, contender: Contender, tokens: int) -> dict[str, Any]:
    steps, first = config.train.steps, config.run.seed * training.SEEDS_APART
    optimizer = torch.optim.AdamW(asked.parameters(), lr=contender.lr, betas=training.BETAS, weight_decay=0.0)
    schedule = training.Schedule(steps, batch=0, lr=contender.lr, warmup=config.train.warmup_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(training.share, schedule))
    ends, accuracy = _ends(steps), []
    recent: list[tuple[int, int]] = []  # right, asked
    for step in range(steps):
        mix = STAGES[sum(step >= end for end in ends[:-1])].mix
        batch = training.on_device(language.batch(first + step, max(1, tokens // mix.tokens), mix))
        set_budget([asked.model], config, step + 1, batch.tokens.numel())
        logits, labels = asked(batch)
        # A sparse sequence may ask nothing.
        loss = F.cross_entropy(logits.float(), labels, reduction="sum") / max(1, len(labels))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not nn.utils.clip_grad_norm_(asked.parameters(), training.CLIP).isfinite():
            raise ArithmeticError(f"a gradient was not finite at step {step}")
        optimizer.step()
        scheduler.step()
        recent = [*recent[-49:], (int((logits.argmax(-1) == labels).sum()), len(labels))]
        if step + 1 in ends:
            right, answered = map(sum, zip(*recent, strict=True))
            accuracy.append(round(right / max(1, answered), 4))
            print(f"  {contender.mixer}: step {step + 1} of {steps}, accuracy {accuracy[-1]:.2f}", file=sys.stderr)
    return {"accuracy": accuracy, "unwritten": _unwritten(asked)}


@torch.no_grad()
def _unwritten(asked: training.Asked) -> list[float]:
    """The share of filler that each memory with a write gate leaves unwritten, over a batch of the last stage's mix."""
    memories = [module for module in asked.modules() if isinstance(module, AtlasMixer) and module.memory.write_gate]
    filler = language.batch(training.EVALUATION_SEED, 1, replace(STAGES[-1].mix, filler=(1.0, 1.0)))
    with in_mode(*memories, measure=True):
        asked(training.on_device(filler))
    return [round(float(memory.measurements["unwritten"]), 5) for memory in memories]


def _ends(steps: int) -> list[int]:
    """The step at which each stage ends."""
    shares = [sum(stage.share for stage in STAGES[: n + 1]) for n in range(len(STAGES))]
    return [round(share * steps) for share in shares]


def score(prediction: str, question: recall.Question) -> dict[str, float]:
    return {METRIC: float(prediction.strip() == question.answers[0])}


def read_and_ask(name: str, seed: int, runs: Path, length: int, count: int) -> record.Cell:
    """What a trained model recalls of `count` contexts, read one by one so that speeds of all lengths compare."""
    quieten()
    task, reader = Recall("recall", language.example, score), open_reader(folder_of(name, seed, runs))
    first = seed * count
    read = [recall.measured(task, reader, length, range(place, place + 1)) for place in range(first, first + count)]
    return {"contender": name, "seed": seed, "length": length, "read": read}


def lengths_of(name: str, grid: Grid) -> list[int]:
    """The lengths that a contender reads and can hold."""
    contender = CONTENDERS[name]
    longest = min(contender.reach, grid.held) if contender.grows else contender.reach
    return [length for length in grid.samples if length <= longest]


def folder_of(name: str, seed: int, runs: Path) -> Path:
    return runs / f"{name.replace(',', '').replace(' ', '_')}_{seed}"


def trained_cell(name: str, seed: int) -> str:
    return f"{name}, seed {seed}, trained"


def read_cell(name: str, seed: int, length: int) -> str:
    return f"{name}, seed {seed}, {length} tokens"


def reads_of(results: record.Record, name: str, seed: int, grid: Grid) -> list[int]:
    """The lengths that a contender's model of this seed reads; none where training failed."""
    if "wrong" in results.cells.get(trained_cell(name, seed), {}):
        return []
    return [n for n in lengths_of(name, grid) if n <= grid.all_seeds or seed == grid.seeds[0]]


def _cells(results: record.Record, name: str, seed: int, grid: Grid) -> list[str]:
    """All cells of a contender's seed: its training, and every length that it reads."""
    lengths = reads_of(results, name, seed, grid)
    return [trained_cell(name, seed), *(read_cell(name, seed, length) for length in lengths)]


def points(results: record.Record, name: str) -> list[Point]:
    """Recall, memory and speed at every length, over all seeds."""
    mine = [cell for cell in results.cells.values() if cell.get("contender") == name and "read" in cell]
    return recall.points([read for cell in mine for read in cell["read"]], METRIC)


def drop_lost(results: record.Record, grid: Grid, runs: Path) -> None:
    """Drop the cells of models that still have lengths to read but no checkpoint, so that they are trained anew."""
    for name, seed in product(grid.contenders, grid.seeds):
        own = _cells(results, name, seed, grid)
        kept = (folder_of(name, seed, runs) / "checkpoints").is_dir()
        if any(cell not in results.cells for cell in own) and not kept:
            for cell in own:
                results.cells.pop(cell, None)


def draw(results: record.Record, grid: Grid) -> None:
    with pyplot.style.context(record.STYLE):
        figure, panels = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
        for place, name in enumerate(grid.contenders):
            if not (found := points(results, name)):
                continue
            lengths, colour = [p.length for p in found], f"C{place}"
            errors = [p.error or 0.0 for p in found]
            panels[0].errorbar(
                lengths, [p.mean for p in found], errors, marker="o", markersize=4, color=colour, label=name, capsize=2
            )
            panels[1].plot(lengths, [p.peak_bytes / 2**20 for p in found], marker="o", markersize=4, color=colour)
            panels[2].plot(lengths, [p.tokens_per_second for p in found], marker="o", markersize=4, color=colour)
        chance = fmean(1 / len(kind.answers) for kind in language.KINDS)
        panels[0].axhline(chance, color="grey", linestyle=":", linewidth=1)
        panels[0].axvline(STAGES[-1].mix.tokens, color="grey", linestyle="--", linewidth=1)
        panels[0].set_ylim(-0.03, 1.03)
        recalled = "facts recalled (dotted: chance; dashed: longest trained)"
        titles = (recalled, "peak memory of the process (MiB)", "tokens/s read")
        for axes, title in zip(panels, titles, strict=True):
            _finish(axes, title, tuple(grid.samples))
        panels[1].set_ylim(0, 1.1 * panels[1].get_ylim()[1])
        panels[2].set_yscale("log")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
        results.save_figure(figure)


def _finish(axes: Axes, title: str, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, map(_short, lengths))
    axes.set_xlim(lengths[0] / 1.5, lengths[-1] * 1.5)
    axes.set_xlabel("tokens of the context")
    axes.set_title(title, fontsize="medium")


def describe(results: record.Record, grid: Grid, observed: Sequence[str]) -> None:
    """The page: what each model recalls of contexts of each length, and what reading them took."""
    rows, failed = [], []
    for name in grid.contenders:
        trained = [results.cells[cell] for seed in grid.seeds if (cell := trained_cell(name, seed)) in results.cells]
        failed.extend(f"{name}, seed {cell['seed']}: {cell['wrong']}" for cell in trained if "wrong" in cell)
        cells, found = [cell for cell in trained if "wrong" not in cell], points(results, name)
        if cells and found:
            rows.append(_row(name, cells, found, grid))
    counts = map(str, grid.samples.values())
    rows.append(("contexts read, a seed", "", "", *counts, *[""] * 5))
    head = ("model", "numbers of state", "right in training, %", *map(_short, grid.samples), "MiB, shortest context")
    head += ("MiB, longest context", "thousand tokens/s, slowest length", "fastest length", "unwritten, %")
    begun = [s for s in grid.seeds if any(trained_cell(name, s) in results.cells for name in grid.contenders)]
    seeds, last = record.seeds_said(begun), "" if len(begun) == 1 else ", the first alone beyond "
    longer = {name: CONTENDERS[name].longer for name in grid.contenders if CONTENDERS[name].longer > 1}
    results.write_text(
        "Recall against the length of the context",
        f"Percent of facts recalled after contexts of 1K (1,024) tokens and more, from {seeds}"
        f"{last and last + _short(grid.all_seeds)}. Each context holds {language.FACTS} facts. Models train for "
        f"{grid.steps:,} steps of {grid.tokens:,} tokens, on sequences of at most {STAGES[-1].mix.tokens:,}. "
        f"{record.longer_said(longer)} *Right in training*: answers at its end, a number a seed. *MiB*: peak memory "
        "of the process. Speeds are those of one core. *Unwritten*: the share of filler at which a layer's write gate "
        f"is exactly zero, of the worst seed.{_made(results, grid)}",
        [record.Table(head, rows), *([f"Not trained to the end: {'; '.join(failed)}."] if failed else [])],
        observed,
    )


def _made(results: record.Record, grid: Grid) -> str:
    """How many models have been trained and lengths read; empty where all have."""
    wanted = [cell for name, seed in product(grid.contenders, grid.seeds) for cell in _cells(results, name, seed, grid)]
    found = sum(cell in results.cells for cell in wanted)
    missing = "; ".join(name for name in grid.contenders if not points(results, name))
    part = f" **{found} of {len(wanted)} trainings and readings have been made**; the command goes on."
    return "" if found == len(wanted) else f"{part} Not run yet: {missing}." if missing else part


def _row(name: str, cells: Sequence[record.Cell], found: Sequence[Point], grid: Grid) -> tuple[str, ...]:
    """A model's cells of the table."""
    accuracy = ", ".join(f"{100 * cell['accuracy'][-1]:.0f}" for cell in cells)
    recalled = [f"{100 * p.mean:.0f}" for p in found] + [""] * (len(grid.samples) - len(found))
    held = (f"{p.peak_bytes / 2**20:.0f}" for p in (found[0], found[-1]))
    speeds = [p.tokens_per_second / 1000 for p in found]
    layers = zip(*(cell["unwritten"] for cell in cells), strict=True)
    unwritten = ", ".join(f"{100 * min(layer):.2f}" for layer in layers)
    row = (name, f"{cells[0]['state_floats']:,}", accuracy, *recalled, *held)
    return (*row, f"{min(speeds):.1f}", f"{max(speeds):.1f}", unwritten)


def _short(tokens: int) -> str:
    return f"{tokens // 2**20}M" if tokens >= 2**20 else f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


# Of the full grid; the numbers behind it are in the JSON.
OBSERVED: tuple[str, ...] = (
    "After 256K tokens and after a million ATLAS answers all 16 questions, after 4,096 it answers 91 % of 128. "
    "After ten million it answers five of eight. From 4,096 to a million OmegaNet loses 5 points and Titans 12, "
    "which is less than the error of 16 questions. The same models without write gates have not been run.",
    "Gated DeltaNet has no such gate. With the memories' starts it recalls as much as OmegaNet up to 64K, with an "
    "eighth of the state. After 256K it answers by chance.",
    "The memories' first layers leave 99.94 % of the filler unwritten, or more, and their second layers all of "
    "it.",
    "Other work shared the cores while models were read. So the speeds of one model differ by more than its own.",
)


def main(words: Sequence[str] | None = None) -> int:
    asked = record.options("long_context", __doc__, words, reports=True)
    grid = QUICK if asked.quick else FULL
    runs = asked.out / "long_context" if asked.quick else RUNS

    def experiment() -> None:
        # Only what training depends on: longer contexts and more contenders may come later.
        settings = {"steps": grid.steps, "tokens": grid.tokens, "stages": [asdict(stage) for stage in STAGES]}
        results = record.Record("long_context", asked, {**settings, **training.SETTINGS})
        # All contenders of a seed before the next seed, and short contexts before long ones.
        if not asked.report:
            drop_lost(results, grid, runs)
            for seed in grid.seeds:
                jobs = {trained_cell(name, seed): partial(train, name, seed, grid, runs) for name in grid.contenders}
                record.side_by_side(results, jobs)
                lengths = {name: reads_of(results, name, seed, grid) for name in grid.contenders}
                asked_for = [(n, name) for n in grid.samples for name in grid.contenders if n in lengths[name]]
                reads = {
                    read_cell(name, seed, n): partial(read_and_ask, name, seed, runs, n, grid.samples[n])
                    for n, name in asked_for
                }
                record.side_by_side(results, reads)
        draw(results, grid)
        describe(results, grid, () if asked.quick else OBSERVED)

    return record.run("long_context", experiment)


if __name__ == "__main__":
    sys.exit(main())
