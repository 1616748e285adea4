"""How runs are drawn: losses, loss along the context, what memory layers measured; several side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from matplotlib import pyplot
from matplotlib.axes import Axes

from atlas_megatron.reports import diagnostics, evaluations
from atlas_megatron.reports import style as plotting
from atlas_megatron.reports.style import plain, save
from atlas_megatron.training.metrics import Record, read

# Draws one run's part of a panel: axes, records, colour, label.
Draw = Callable[[Axes, list[Record], str, str], Any]
# Bits a byte of a nat, of runs with one tokenizer and one validation text, agree to rounding.
SAME_TOKENIZER = 1.001
STYLE = {**plotting.STYLE, "figure.figsize": (6.4, 4.0)}


def plot_run(directory: str | Path) -> list[Path]:
    """Write the pictures into the run's directory; raises ValueError where it has no metrics."""
    folder = Path(directory)
    records, name = _records(folder), plain(folder.absolute().name)
    written = []
    with pyplot.style.context(STYLE):
        figure, axes = pyplot.subplots(layout="constrained")
        _draw_loss(axes, records)
        axes.set_title(f"{name}: loss")
        written.append(save(figure, folder / "loss.png"))

        by_position = folder / "position_loss.json"
        if by_position.is_file():
            losses, stride, step = _read_positions(by_position)
            figure, axes = pyplot.subplots(layout="constrained")
            _draw_positions(axes, losses, stride)
            axes.set_title(f"{name}: validation loss along the context, step {step}")
            written.append(save(figure, folder / "position_loss.png"))

        measured = diagnostics.figure(records, name)
        if measured is not None:
            written.append(save(measured, folder / "diagnostics.png"))
        evaluated = evaluations.figure(records, name)
        if evaluated is not None:
            written.append(save(evaluated, folder / "evaluation.png"))
    return written


def compare_runs(directories: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write losses, bits per byte and memory share of several runs into one picture, compare.png in the first's
    directory unless `out` names another.

    Runs whose tokens stand for different numbers of bytes are compared in bits per byte alone: nats of different
    tokenizers are no common measure. Raises ValueError where a run has no metrics, or no bits per byte where it needs
    them.
    """
    folders = [Path(directory) for directory in directories]
    names = [plain(folder.absolute().name) for folder in folders]
    if len(set(names)) < len(names):
        names = [plain(str(folder)) for folder in folders]
    runs = dict(zip(names, map(_records, folders), strict=True))
    panels = _panels(runs)
    with pyplot.style.context(STYLE):
        rows, columns = (2, 2) if len(panels) == 4 else (1, len(panels))
        size = (5.5 * columns, 3.75 * rows)
        figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
        scale, unit = _tokens_in(max(records[-1]["tokens"] for records in runs.values()))
        for (title, (of, draw)), axes in zip(panels.items(), grid.flat, strict=True):
            for number, (name, records) in enumerate(runs.items()):
                draw(axes, records, f"C{number % 10}", name)
            if draw is diagnostics.draw_mean_share:
                diagnostics.mark_low_share(axes)
            axes.set_title(title)
            axes.set_ylabel(of)
            axes.set_xlabel(unit)
            # Drawn in millions.
            axes.xaxis.set_major_formatter(lambda value, _: f"{value * 1e6 / scale:g}")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="small", handlelength=3)
        return save(figure, folders[0] / "compare.png" if out is None else Path(out))


def _panels(runs: dict[str, list[Record]]) -> dict[str, tuple[str, Draw]]:
    """What there is to compare, by title: its unit, and what draws it of one run."""
    factors = {name: bits_a_nat(records) for name, records in runs.items()}
    known = [factor for factor in factors.values() if factor]
    differ = bool(known) and max(known) > SAME_TOKENIZER * min(known)
    unknown = [name for name, factor in factors.items() if not factor]
    if differ and unknown:
        raise ValueError(
            f"the runs have different tokenizers, and {', '.join(unknown)} has no validation in bits per byte; leave "
            "it out, or validate it"
        )
    bits, nats = "bits per byte", "nats per token"
    unit = bits if differ else nats
    panels: dict[str, tuple[str, Draw]] = {"training loss, smoothed": (unit, partial(_draw_training, in_bits=differ))}
    if not differ and any("validation_loss" in r for records in runs.values() for r in records):
        panels["validation loss"] = (nats, _draw_validation)
    if known:
        panels["validation bits per byte"] = (bits, partial(_draw_key, key="validation_bits_per_byte"))
    layers = [layer for records in runs.values() for r in records for layer in r.get("layers", {}).values()]
    if any("memory_share" in layer for layer in layers):
        panels["memory share, mean of layers"] = ("share of the output's variation", diagnostics.draw_mean_share)
    return panels


def bits_a_nat(records: list[Record]) -> float | None:
    """What a nat a token is in bits a byte of the validation's text; None where that was not measured."""
    for record in reversed(records):
        if record.get("validation_bits_per_byte") and record.get("validation_loss"):
            return record["validation_bits_per_byte"] / record["validation_loss"]
    return None


def _draw_training(axes: Axes, records: list[Record], colour: str, name: str, *, in_bits: bool) -> None:
    window = min(len(records), max(5, len(records) // 40))
    losses = numpy.array([r["loss"] for r in records]) * ((bits_a_nat(records) or 1.0) if in_bits else 1.0)
    axes.plot(_millions(records)[window - 1 :], _running_mean(losses, window), color=colour, label=name)


def _draw_validation(axes: Axes, records: list[Record], colour: str, name: str) -> None:
    _draw_key(axes, records, colour, name, key="validation_loss")
    _draw_key(axes, records, colour, f"{name}, memory ablated", key="validation_loss_silenced", dashed=True)


def _records(folder: Path) -> list[Record]:
    records = read(folder)
    if not records:
        raise ValueError(f"{folder} has no finished step; train first")
    for record in records:
        if not all(isinstance(record.get(key), int | float) for key in ("loss", "tokens")):
            raise ValueError(f"step {record['step']} of {folder} has no loss, or no tokens; remove it in metrics.jsonl")
    return records


def _read_positions(file: Path) -> tuple[numpy.ndarray, int, int]:
    """Losses by position, the distance of its windows, and the step. Raises ValueError for another form."""
    try:
        said = json.loads(file.read_bytes())
        losses, stride, step = numpy.array(said["loss"], dtype=float), said["stride"], said["step"]
        if losses.ndim != 1 or type(stride) is not int or not 0 < stride <= len(losses):
            raise ValueError(f"{losses.shape} losses, stride {stride!r}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{file} is no loss by position ({error}); remove it: the run writes it anew when it validates"
        ) from error
    return losses, stride, step


def _millions(records: list[Record]) -> numpy.ndarray:
    """Tokens seen at each record."""
    return numpy.array([r["tokens"] for r in records]) / 1e6


def _tokens_in(most: float) -> tuple[float, str]:
    """The unit of an axis of tokens, and its label, in which the largest is a number that can be read."""
    for scale, name in ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)")):
        if most >= scale:
            return scale, f"tokens seen{name}"
    return 1.0, "tokens seen"


def _draw_key(axes: Axes, records: list[Record], colour: str, label: str, *, key: str, dashed: bool = False) -> None:
    """One number of the records that have it, against millions of tokens seen."""
    having = [r for r in records if r.get(key) is not None]
    if having:
        style = "--" if dashed else "-"
        values = [r[key] for r in having]
        axes.plot(_millions(having), values, style, color=colour, marker="o", markersize=3, label=label)


def _draw_loss(axes: Axes, records: list[Record]) -> None:
    tokens = _millions(records)
    losses = numpy.array([r["loss"] for r in records])
    axes.plot(tokens, losses, color="C0", alpha=0.35, linewidth=0.8, label="each training step")
    # A line of a short run too: a mean of few steps says more than the steps.
    window = max(len(losses) // 40, min(5, len(losses) // 3))
    if window > 1:
        axes.plot(tokens[window - 1 :], _running_mean(losses, window), color="C0", label=f"mean of {window} steps")
    _draw_key(axes, records, "C1", "validation", key="validation_loss")
    _draw_key(axes, records, "C2", "validation, memory ablated", key="validation_loss_silenced", dashed=True)
    scale, unit = _tokens_in(records[-1]["tokens"])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value * 1e6 / scale:g}")
    axes.set_xlabel(unit)
    axes.set_ylabel("loss (nats per token)")
    axes.legend()


def _draw_positions(axes: Axes, losses: numpy.ndarray, stride: int) -> None:
    """Positions one stride apart show the same tokens: what these cost in the context's later half is taken out."""
    whole = losses[: len(losses) // stride * stride].reshape(-1, stride)
    late = whole[len(whole) // 2 :]
    of_context = (whole - late.mean(0) + late.mean()).ravel()
    positions = numpy.arange(1, len(of_context) + 1)
    axes.plot(positions, of_context, color="C0", alpha=0.3, linewidth=0.7, label="each position")
    ends = numpy.unique(numpy.geomspace(1, len(of_context), 24).astype(int))
    bins = list(zip([0, *ends[:-1]], ends, strict=True))
    centres = [(start + 1 + end) / 2 for start, end in bins]
    means = [of_context[start:end].mean() for start, end in bins]
    axes.plot(centres, means, marker="o", markersize=3, color="C0", label="mean of a stretch")
    axes.set_xscale("log")
    axes.set_xlabel("position in the context (tokens)")
    axes.set_ylabel("validation loss of the same tokens (nats)")
    axes.legend()


def _running_mean(values: numpy.ndarray, window: int) -> numpy.ndarray:
    return numpy.convolve(values, numpy.full(window, 1 / window), mode="valid")
