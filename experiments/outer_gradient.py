"""The outer gradient against the length of the sequence, for memory.anchor_gradient = 1, 0.3 and 0.

An anchor is the weights at which a chunk's inner gradients are taken. The exact outer gradient (1) passes through the
anchors. Over a sequence of N chunks it is a product of N Jacobians. First order (0) takes the anchors as constants.
Damped (0.3) lets 0.3 of the gradient pass through each of them.

First part: the gradient norm before any training, on text, of configs/quickstart.toml with one preset or another. The
retention starts at 0.99 whatever the length, and at 1 - 1/length. Second part: the loss as each learns from sequences
of 4,096 tokens, beside attention, with the retention that it starts from by default.

`atlas-train` runs all of it, two runs side by side on two cores. Run `make quickstart` first, for its corpus.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from matplotlib import pyplot
from matplotlib.axes import Axes

from atlas_megatron.config import load
from atlas_megatron.training.metrics import read
from experiments.shared import record

BASE = record.ROOT / "configs" / "quickstart.toml"
RUNS = record.ROOT / "runs" / "experiments" / "outer_gradient"
LENGTHS = (256, 512, 1024, 2048, 4096)
KINDS = {
    "atlas": (),  # one orthogonalised write a chunk
    "atlas, norm = layer": ("memory.norm=layer",),
    "omeganet": ("memory.preset=omeganet",),
    "titans": ("memory.preset=titans",),
}
ORDERS = {"exact": "1", "damped": "0.3", "first order": "0"}
RETENTIONS = {"0.99": lambda length: 0.99, "1 - 1/length": lambda length: 1 - 1 / length}
STEPS = 60
TOKENS = 4096  # of a step, whatever the length
ATTENTION = "attention"
SMOOTHED = 5  # steps


def words_of(length: int, steps: int) -> list[str]:
    """Words for `steps` of TOKENS each, in sequences of this length."""
    batch = max(1, TOKENS // length)
    words = [f"model.seq_length={length}", f"train.global_batch={batch}", f"train.micro_batch={batch}"]
    words += [f"train.steps={steps}", f"train.warmup_steps={max(1, steps // 6)}", "train.lr=2e-3"]
    words += ["train.validate_every=0", "train.stats_every=1000000", "log.tensorboard=false"]
    return [*words, f"checkpoint.every={steps}"]


def measured(base: Path, words: list[str], directory: Path) -> record.Cell:
    """Losses and gradient norms of a run; both end at a gradient that is not finite."""
    shutil.rmtree(directory, ignore_errors=True)
    status = record.train_quietly([str(base), *words, f"run.directory={directory}"], directory)
    if status not in (0, 1):
        raise ValueError(f"the run in {directory} did not train; its log.txt says why")
    path = directory / "metrics.jsonl"
    records = read(directory) if path.is_file() else []
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    return {
        "loss": [r["loss"] for r in records],
        "grad_norm": [r["grad_norm"] for r in records],
        "finite": status == 0,
        "changes": words,
    }


def jobs_of(kinds: Sequence[str], lengths: Sequence[int], steps: int) -> dict[str, partial[record.Cell]]:
    """What trains each cell, by the cell's name."""
    jobs = {}

    def add(name: str, words: list[str]) -> None:
        directory = RUNS / "".join(letter if letter.isalnum() else "_" for letter in name)
        jobs[name] = partial(measured, BASE, words, directory)

    for length in lengths:
        for retention, start in RETENTIONS.items():
            for kind in kinds:
                for order, share in ORDERS.items():
                    words = [*words_of(length, 2), *KINDS[kind], f"memory.alpha_start={start(length)}"]
                    add(before(kind, order, retention, length), [*words, f"memory.anchor_gradient={share}"])
    for kind in kinds:
        for order, share in ORDERS.items():
            add(after(kind, order), [*words_of(lengths[-1], steps), *KINDS[kind], f"memory.anchor_gradient={share}"])
    add(after(ATTENTION, ""), [*words_of(lengths[-1], steps), "model.pattern=F-*-F-"])
    return jobs


def before(kind: str, order: str, retention: str, length: int) -> str:
    return f"{kind}, {order}, retention {retention}, {length} tokens"


def after(kind: str, order: str) -> str:
    return f"{kind}, {order}, trained" if order else f"{kind}, trained"


def first_norm(cell: record.Cell) -> float:
    return cell["grad_norm"][0] if cell["grad_norm"] else math.inf


def draw(results: record.Record, kinds: Sequence[str], lengths: Sequence[int]) -> None:
    with pyplot.style.context(record.STYLE):
        figure, panels = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
        for panel, retention in zip(panels, RETENTIONS, strict=False):
            for colour, kind in enumerate(kinds):
                for order in ORDERS:
                    norms = [first_norm(results.cells[before(kind, order, retention, n)]) for n in lengths]
                    finite = [(n, norm) for n, norm in zip(lengths, norms, strict=True) if math.isfinite(norm)]
                    panel.plot(*zip(*finite, strict=True), **_line(colour, order), marker="o", markersize=4)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xlabel("tokens of a sequence")
            panel.set_title(f"gradient norm before training, retention {retention}", fontsize="medium")
        top = max(panel.get_ylim()[1] for panel in panels[:2])
        for panel in panels[:2]:
            panel.set_ylim(0.3, top)
        _draw_curves(panels[2], results, kinds)
        figure.legend(*panels[2].get_legend_handles_labels(), loc="outside right upper")
        results.save_figure(figure)


def _draw_curves(panel: Axes, results: record.Record, kinds: Sequence[str]) -> None:
    for colour, kind in enumerate(kinds):
        for order in ORDERS:
            losses = _smooth(results.cells[after(kind, order)]["loss"])
            panel.plot(range(1, len(losses) + 1), losses, **_line(colour, order), label=f"{kind}, {order}")
    losses = _smooth(results.cells[after(ATTENTION, "")]["loss"])
    panel.plot(range(1, len(losses) + 1), losses, color="grey", label=ATTENTION)
    panel.set_xlabel("step")
    panel.set_title(f"training loss (nats, mean of {SMOOTHED} steps)", fontsize="medium")


def _line(colour: int, order: str) -> dict[str, str]:
    return {"color": f"C{colour}", "linestyle": dict(zip(ORDERS, ("--", "-", ":"), strict=True))[order]}


def _smooth(losses: Sequence[float]) -> list[float]:
    return [fmean(losses[max(0, n - SMOOTHED) : n]) for n in range(1, len(losses) + 1)]


def describe(
    results: record.Record, kinds: Sequence[str], lengths: Sequence[int], steps: int, observed: Sequence[str]
) -> None:
    """The page: gradient norms before training, then what each learns."""
    norms = []
    for retention in RETENTIONS:
        for kind in kinds:
            for order in ORDERS:
                found = (first_norm(results.cells[before(kind, order, retention, n)]) for n in lengths)
                shown = (f"{norm:.2g}" if math.isfinite(norm) else "not finite" for norm in found)
                norms.append((kind, retention, order, *shown))
    curves = []
    for kind, order in [*((kind, order) for kind in kinds for order in ORDERS), (ATTENTION, "")]:
        cell = results.cells[after(kind, order)]
        last = cell["loss"][-min(10, steps) :]
        ends = f"{fmean(last):.3f}" if cell["finite"] else f"not finite after {len(cell['loss'])} steps"
        largest = f"{max(cell['grad_norm']):.2g}" if cell["grad_norm"] else ""
        curves.append((kind, order, ends, largest))
    results.write_text(
        "The outer gradient against the length",
        "Gradient norm of the whole model before any step, on text, for sequences of rising length; one seed. "
        "*Exact*: with the gradient through the weights at which inner gradients are taken. *Damped*: with 0.3 of it. "
        "*First order*: without it.",
        [
            record.Table(("memory", "retention", "gradient", *(f"{n:,} tokens" for n in lengths)), norms),
            f"Then each trains for {steps} steps of one sequence of {lengths[-1]:,} tokens, with the retention that it "
            "starts from by default. Gradients are clipped at 1.",
            record.Table(("model", "gradient", "mean loss of the last 10 steps", "largest gradient norm"), curves),
        ],
        observed,
    )


# Of the full grid; the numbers behind it are in the JSON.
OBSERVED: tuple[str, ...] = ()


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, then draw and describe."""

    def experiment() -> None:
        asked = record.options("outer_gradient", __doc__ or "", words)
        kinds, lengths, steps = (("atlas",), (64, 128), 2) if asked.quick else (tuple(KINDS), LENGTHS, STEPS)
        if not Path(f"{load(BASE).data.train[0]}.idx").is_file():
            raise ValueError(f"{load(BASE).data.train[0]}.idx is missing; run make quickstart once, which prepares it")
        results = record.Record("outer_gradient", asked, {"kinds": kinds, "lengths": lengths, "steps": steps})
        record.side_by_side(results, jobs_of(kinds, lengths, steps))
        draw(results, kinds, lengths)
        describe(results, kinds, lengths, steps, () if asked.quick else OBSERVED)

    return record.run("outer_gradient", experiment)


if __name__ == "__main__":
    sys.exit(main())
