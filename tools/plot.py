"""Draw a run: loss.png (training and validation loss) and position_loss.png (loss against position in the context)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy

from atlas_megatron.metrics import read

matplotlib.use("Agg")  # files only: a machine that trains has no screen
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

STYLE = {
    "figure.figsize": (6.4, 4.0),
    "figure.dpi": 160,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
EXAMPLES = """\
examples:
  python tools/plot.py runs/quickstart
  python tools/plot.py runs/first runs/second
"""


def plot_run(directory: str | Path) -> list[Path]:
    """Write the pictures into the run's directory; raises ValueError where it has no metrics."""
    folder = Path(directory)
    records = read(folder)
    if not records:
        raise ValueError(f"{folder} has no finished step; train first")
    written = []
    with pyplot.style.context(STYLE):
        figure, axes = pyplot.subplots(layout="constrained")
        _draw_loss(axes, records)
        axes.set_title(f"{folder.name}: loss")
        written.append(folder / "loss.png")
        figure.savefig(written[-1])
        pyplot.close(figure)

        by_position = folder / "position_loss.json"
        if by_position.is_file():
            validation = json.loads(by_position.read_text())
            figure, axes = pyplot.subplots(layout="constrained")
            _draw_positions(axes, numpy.array(validation["loss"]), validation["stride"])
            axes.set_title(f"{folder.name}: validation loss along the context, step {validation['step']}")
            written.append(folder / "position_loss.png")
            figure.savefig(written[-1])
            pyplot.close(figure)
    return written


def _draw_loss(axes: Axes, records: list[dict]) -> None:
    tokens = numpy.array([r["tokens"] for r in records]) / 1e6
    losses = numpy.array([r["loss"] for r in records])
    axes.plot(tokens, losses, color="C0", alpha=0.35, linewidth=0.8, label="each training step")
    window = max(1, len(losses) // 40)
    if window > 1:
        axes.plot(tokens[window - 1 :], _running_mean(losses, window), color="C0", label=f"mean of {window} steps")
    validated = [(r["tokens"] / 1e6, r["validation_loss"]) for r in records if "validation_loss" in r]
    if validated:
        axes.plot(*zip(*validated, strict=True), color="C1", marker="o", markersize=3, label="validation")
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()


def _draw_positions(axes: Axes, losses: numpy.ndarray, stride: int) -> None:
    """Positions one stride apart show the same tokens: what those tokens cost on average is taken out of each."""
    whole = losses[: len(losses) // stride * stride].reshape(-1, stride)
    of_context = (whole - whole.mean(0) + whole.mean()).ravel()
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


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory, with metrics.jsonl")
    try:
        for run in parser.parse_args(words).runs:
            for path in plot_run(run):
                print(path)
    except (ValueError, OSError) as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
