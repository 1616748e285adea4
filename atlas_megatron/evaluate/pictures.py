"""A picture for each task of an evaluation: scores against length, with the speed and memory that reading took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes

from atlas_megatron.evaluate.recall import Point
from atlas_megatron.reports.style import STYLE, plain, save


def recall(path: Path, title: str, metrics: Mapping[str, Sequence[Point]]) -> None:
    """Scores by metric, tokens a second and peak memory against the length of the context."""
    with pyplot.style.context(STYLE):
        figure, (scores, speed, memory) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
        for number, (name, points) in enumerate(metrics.items()):
            errors = [point.error or 0.0 for point in points]
            lengths = [_shown(point.length) for point in points]
            # Where two metrics agree, the one below shows around the one above.
            look = {"markersize": 9 - 5 * number / len(metrics), "linewidth": 4 - 3 * number / len(metrics)}
            marker = "os^Dv"[number % 5]
            scores.errorbar(lengths, [p.mean for p in points], errors, marker=marker, capsize=2, label=name, **look)
        scores.set_ylim(-0.03, 1.03)
        scores.set_ylabel("share that is right")
        scores.legend()
        points = next(iter(metrics.values()))
        lengths = [_shown(point.length) for point in points]
        speed.plot(lengths, [point.tokens_per_second for point in points], marker="o", markersize=4)
        memory.plot(lengths, [point.peak_bytes / 2**20 for point in points], marker="o", markersize=4)
        for axes in (speed, memory):
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        for axes, of in ((scores, title), (speed, "tokens/s read"), (memory, "peak memory (MiB)")):
            _against_length(axes, of)
        save(figure, path)


def perplexity(
    path: Path, title: str, contexts: Mapping[int, Mapping[str, float | None]], along: Mapping[str, Any] | None
) -> None:
    """Loss of the same tokens against the context before them, and the loss along the longest reading."""
    with pyplot.style.context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
        # No context has no place on a logarithmic axis: it stands before the shortest, under its own name.
        none = min((context for context in contexts if context), default=2) / 2
        lengths = [context or none for context in contexts]
        losses = [found["loss"] for found in contexts.values()]
        errors = [found["error"] or 0.0 for found in contexts.values()]
        axes.errorbar(
            lengths, losses, errors, marker="o", markersize=4, capsize=2, label="the same tokens, after so much context"
        )
        if along:
            starts = [0, *along["ends"][:-1]]
            centres = [(start + 1 + end) / 2 for start, end in zip(starts, along["ends"], strict=True)]
            axes.plot(centres, along["loss"], color="C1", alpha=0.6, label="the tokens of each position, while reading")
        axes.set_ylabel("loss (nats per token)")
        axes.legend()
        _against_length(axes, title)
        if 0 in contexts:
            axes.set_xticks(lengths, ["none" if not context else f"{context:,}" for context in contexts])
            axes.minorticks_off()
        save(figure, path)


def shares(path: Path, title: str, points: Mapping[int, tuple[float, float]], chance: Mapping[int, float]) -> None:
    """Accuracy with its standard error by length, and what guessing scores."""
    with pyplot.style.context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
        means, errors = zip(*points.values(), strict=True)
        axes.errorbar(list(points), means, errors, marker="o", markersize=4, capsize=2, label="the model")
        axes.set_ylabel("accuracy")
        axes.plot(list(chance), list(chance.values()), color="grey", linestyle=":", label="any value of the context")
        axes.set_ylim(-0.03, 1.03)
        axes.legend()
        _against_length(axes, title)
        save(figure, path)


def chunks(path: Path, title: str, points: Mapping[int, Mapping[str, float | None]], trained: int) -> None:
    """Bits per byte of the same text against the chunk that it is read with; a line at the one of training."""
    with pyplot.style.context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
        axes.plot(list(points), [found["bits_per_byte"] for found in points.values()], marker="o", markersize=4)
        axes.axvline(trained, color="grey", linestyle=":", label="the chunk of training")
        axes.set_ylabel("bits per byte")
        axes.legend()
        _against_length(axes, title)
        axes.set_xlabel("chunk that the model is read with (tokens)")
        axes.set_xticks(list(points), [f"{chunk:,}" for chunk in points])
        axes.minorticks_off()
        save(figure, path)


def bars(path: Path, title: str, scores: Mapping[str, tuple[float, float]]) -> None:
    """One bar a metric, with its standard error."""
    with pyplot.style.context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6.4, 1 + 0.5 * len(scores)), layout="constrained")
        means, errors = zip(*scores.values(), strict=True)
        axes.barh(list(scores), means, xerr=errors, height=0.6)
        axes.invert_yaxis()
        axes.set_title(plain(title), fontsize="medium")
        save(figure, path)


def _shown(length: int) -> int:
    """A context of nothing has no place on a logarithmic axis."""
    return max(1, length)


def _against_length(axes: Axes, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens")
    axes.set_title(plain(title), fontsize="medium")
