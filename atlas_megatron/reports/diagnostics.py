"""The panels of diagnostics.png: what the memory layers of a run measured, one colour a layer, over its steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import matplotlib
import numpy
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atlas_megatron.training.metrics import HISTOGRAM, LOW_MEMORY_SHARE, SPECTRUM, Record

GATES = ("alpha", "eta", "theta", "gamma")
COLUMNS = 4
FEW_LAYERS = 8  # that a legend can name

# Steps and values [N] or [N, entries] of one measurement, by layer number.
Courses = dict[str, tuple[numpy.ndarray, numpy.ndarray]]
Panel = Callable[[Axes], None]


def figure(records: list[Record], name: str) -> Figure | None:
    """All panels of a run whose measurements it holds; None where it has none."""
    panels = _panels(records)
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    drawn, grid = pyplot.subplots(
        rows, COLUMNS, figsize=(3.6 * COLUMNS, 2.9 * rows + 0.9), layout="constrained", squeeze=False
    )
    for axes, (title, panel) in zip(grid.flat, panels.items(), strict=False):
        panel(axes)
        axes.set_title(title, fontsize="medium")
        if not axes.get_xlabel():
            axes.set_xlabel("step")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    _name_layers(drawn, _layers(records))
    drawn.suptitle(f"{name}: memory layers")
    return drawn


def draw_mean_share(axes: Axes, records: list[Record], colour: str, label: str) -> None:
    """The mean of all layers' memory share, with the span between the lowest and the highest, over millions of
    tokens; nothing where no layer has one."""
    having = []
    for record in records:
        shares = [layer["memory_share"] for layer in record.get("layers", {}).values() if "memory_share" in layer]
        if shares:
            having.append((record["tokens"] / 1e6, numpy.mean(shares), min(shares), max(shares)))
    if having:
        tokens, mean, low, high = numpy.array(having).T
        axes.plot(tokens, mean, color=colour, label=label)
        axes.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0)


def mark_low_share(axes: Axes) -> None:
    """The line below which a memory has collapsed, on an axis of shares."""
    if axes.lines:
        axes.axhline(LOW_MEMORY_SHARE, color="red", linestyle=":", label=f"warning at {LOW_MEMORY_SHARE:.0%}")
        axes.set_ylim(0, None)
    else:
        axes.text(0.5, 0.5, "no layer joins memory and attention", ha="center", transform=axes.transAxes)


def _panels(records: list[Record]) -> dict[str, Panel]:
    """Title and drawing of each panel there are measurements for."""
    course = lambda name: _course(records, name)  # noqa: E731
    colours = _colours(_layers(records))
    found: dict[str, Panel] = {}
    for gate in GATES:
        mean, std = course(f"{gate}_mean"), course(f"{gate}_std")
        if std:
            found[f"{gate}: mean and spread"] = partial(_draw_spread, means=mean, spreads=std, colours=colours)
    for gate in GATES:
        counts = course(f"{gate}{HISTOGRAM}")
        if counts:
            bound = " (of its bound)" if gate == "eta" else ""
            found[f"{gate}: values{bound}"] = partial(_draw_histograms, counts=counts, colours=colours)
    before, after = course("surprise_before"), course("surprise_after")
    if before:
        lines = {"before the write": before, "after it": after}
        found["surprise: inner loss on a key"] = lambda axes: _draw_lines(axes, lines, colours)
    memory, momentum, start = course("memory_norm"), course("momentum_norm"), course("start_norm")
    if memory:
        norms = {"momentum": momentum, "memory": memory, "start weights": start}
        found["norms"] = lambda axes: _draw_lines(axes, norms, colours, log=True)
    spectra = {kind: course(f"{kind}{SPECTRUM}") for kind in ("momentum", "orthogonalised")}
    if spectra["momentum"]:
        found["singular values around Newton-Schulz"] = lambda axes: _draw_spectra(axes, spectra, colours)
    share = course("memory_share")
    if share:
        found["memory share of the output"] = lambda axes: _draw_share(axes, share, colours)
    return found


def _layers(records: list[Record]) -> list[str]:
    """The numbers of all layers that measured something, in order."""
    found = {number for record in records for number, layer in record.get("layers", {}).items() if layer}
    return sorted(found, key=int)


def _course(records: list[Record], name: str) -> Courses:
    found: dict[str, list[tuple[int, object]]] = {}
    for record in records:
        for number, layer in record.get("layers", {}).items():
            if name in layer:
                found.setdefault(number, []).append((record["step"], layer[name]))
    return {
        number: (numpy.array([step for step, _ in pairs]), numpy.array([value for _, value in pairs]))
        for number, pairs in found.items()
    }


def _colours(layers: list[str]) -> dict[str, tuple]:
    """From the first layer, dark, to the last, light."""
    places = numpy.linspace(0.0, 0.85, max(2, len(layers)))
    return {number: matplotlib.colormaps["viridis"](place) for number, place in zip(layers, places, strict=False)}


def _name_layers(drawn: Figure, layers: list[str]) -> None:
    colours = _colours(layers)
    named = layers if len(layers) <= FEW_LAYERS else [layers[0], layers[len(layers) // 2], layers[-1]]
    lines = [matplotlib.lines.Line2D([], [], color=colours[number], linewidth=3) for number in named]
    drawn.legend(lines, [f"layer {number}" for number in named], loc="outside lower center", ncols=len(named))


def _draw_lines(axes: Axes, courses: dict[str, Courses], colours: dict[str, tuple], *, log: bool = False) -> None:
    """Several measurements of all layers: the first dashed, the second solid, the third dotted."""
    for (label, course), style in zip(courses.items(), ("--", "-", ":"), strict=False):
        for number, (steps, values) in course.items():
            axes.plot(steps, values, style, color=colours[number], linewidth=1)
        if course:
            axes.plot([], [], style, color="black", linewidth=1, label=label)
    if log:
        axes.set_yscale("log")


def _draw_spread(axes: Axes, means: Courses, spreads: Courses, colours: dict[str, tuple]) -> None:
    """A band of one standard deviation around the mean."""
    for number, (steps, mean) in means.items():
        spread = spreads[number][1]
        axes.plot(steps, mean, color=colours[number], linewidth=1)
        axes.fill_between(steps, mean - spread, mean + spread, color=colours[number], alpha=0.15, linewidth=0)


def _draw_histograms(axes: Axes, counts: Courses, colours: dict[str, tuple]) -> None:
    """The last measured step's; each bin's share of the layer's gates."""
    for number, (_, course) in counts.items():
        edges = numpy.linspace(0, 1, course.shape[1] + 1)
        axes.stairs(course[-1] / max(1, course[-1].sum()), edges, color=colours[number])
    axes.set_xlabel(f"value, step {max(steps[-1] for steps, _ in counts.values())}")
    axes.set_ylabel("share of gates")
    axes.set_xlim(-0.02, 1.02)


def _draw_spectra(axes: Axes, spectra: dict[str, Courses], colours: dict[str, tuple]) -> None:
    """Medians as lines, the middle half as a band; not the least: a layer norm leaves one direction to rounding."""
    for (kind, course), style in zip(spectra.items(), ("--", "-"), strict=True):
        for number, (steps, values) in course.items():
            axes.plot(steps, values[:, 2], style, color=colours[number], linewidth=1)
            axes.fill_between(steps, values[:, 1], values[:, 3], color=colours[number], alpha=0.12, linewidth=0)
        axes.plot([], [], style, color="black", linewidth=1, label=kind)
    axes.axhline(1.0, color="red", linewidth=0.8, linestyle=":", label="an orthogonal matrix")
    axes.set_yscale("log")


def _draw_share(axes: Axes, share: Courses, colours: dict[str, tuple]) -> None:
    for number, (steps, values) in share.items():
        axes.plot(steps, values, color=colours[number], linewidth=1)
    mark_low_share(axes)
