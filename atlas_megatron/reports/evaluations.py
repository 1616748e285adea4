"""The panels of evaluation.png: what tasks scored on the way of a run, one line a length of context."""

from __future__ import annotations

from typing import Any

from matplotlib import colormaps, pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atlas_megatron.reports.style import plain
from atlas_megatron.training.metrics import Record

COLUMNS = 3
ALONG = "along"  # losses by position
# A task's first measure that is here is drawn, and named so.
MEASURES = {"loss": "nats per token", "accuracy": "share that is right"}

# Measures by length, at each number of tokens seen.
Course = list[tuple[float, dict[str, Any]]]


def figure(records: list[Record], name: str) -> Figure | None:
    """A panel a task, and one of losses by position; None where a run was not evaluated."""
    courses: dict[str, Course] = {}
    for record in records:
        for task, found in record.get("evaluation", {}).items():
            courses.setdefault(task, []).append((record["tokens"] / 1e6, found))
    if not courses:
        return None
    along = [(tokens, found[ALONG]) for course in courses.values() for tokens, found in course if ALONG in found]
    count = len(courses) + bool(along)
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    drawn, grid = pyplot.subplots(
        rows, columns, figsize=(4.6 * columns, 3.4 * rows + 0.4), layout="constrained", squeeze=False
    )
    for axes, (task, course) in zip(grid.flat, courses.items(), strict=False):
        _draw_course(axes, course)
        axes.set_title(plain(task), fontsize="medium")
    if along:
        _draw_along(grid.flat[len(courses)], along)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    drawn.suptitle(f"{name}: evaluated on the way")
    return drawn


def _draw_course(axes: Axes, course: Course) -> None:
    """Of one task: its first measure at each length, against millions of tokens seen."""
    lengths = sorted({int(length) for _, found in course for length in found if length != ALONG})
    shown = ""
    for number, length in enumerate(lengths):
        having = [(tokens, found[str(length)]) for tokens, found in course if str(length) in found]
        shown = next((name for name in MEASURES if name in having[0][1]), next(iter(having[0][1])))
        axes.plot(
            [tokens for tokens, _ in having], [measures[shown] for _, measures in having],
            color=colormaps["viridis"](number / max(1, len(lengths))), marker="o", markersize=3,
            label=f"{length:,} tokens" if length else "no context",
        )  # fmt: skip
    if shown != "loss":
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel(MEASURES.get(shown, shown.replace("_", " ")))
    axes.legend(fontsize="small")


def _draw_along(axes: Axes, along: Course) -> None:
    """Losses by position of the first evaluation and of the last."""
    for number, (tokens, found) in enumerate(along if len(along) < 3 else (along[0], along[-1])):
        starts = [0, *found["ends"][:-1]]
        centres = [(start + 1 + end) / 2 for start, end in zip(starts, found["ends"], strict=True)]
        axes.plot(centres, found["loss"], color=f"C{number}", marker="o", markersize=3, label=f"{tokens:.3g}M tokens")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position (tokens)")
    axes.set_ylabel(MEASURES["loss"])
    axes.set_title("perplexity: loss by position", fontsize="medium")
    axes.legend(fontsize="small")
