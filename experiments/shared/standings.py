"""What a comparison of language models shows: a picture, a table by seed, a table by rate, and who is ahead.

A part of the runs is described as such: contenders without a run are named, and have no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from matplotlib import pyplot

from experiments.shared import protocol, record
from experiments.shared.protocol import Contender, Protocol


def draw(results: record.Record, stage: str, names: Sequence[str], comparison: Protocol) -> None:
    """Left: every learning rate after a quarter of the tokens. Right: every seed a dot, their mean a line. Those
    without a run are left out."""
    places = ("lr", "seed")
    begun = [n for n in names if any(c.startswith(f"{stage}: {n}, {p} ") for c in results.cells for p in places)]
    names = begun or names
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(9, 0.32 * len(names) + 1.3), layout="constrained"
    )
    for number, rate in enumerate(_rates(results, stage, names, comparison)):
        cells = (results.cells.get(protocol.rate_cell(stage, name, rate), {}) for name in names)
        found = {row: cell["bits_per_byte"] for row, cell in enumerate(cells) if cell.get("bits_per_byte") is not None}
        places = list(found.values()), list(found)
        left.plot(*places, "o", color=f"C{number}", alpha=0.7, markersize=4, label=f"{rate:g}")
    for row, name in enumerate(names):
        reached = [b for b in protocol.reached(results, stage, name, comparison.seeds) if b is not None]
        right.plot(reached, [row] * len(reached), "o", color="C0", alpha=0.6, markersize=4)
        if reached:
            right.plot([mean(reached)] * 2, [row - 0.3, row + 0.3], color="C0", linewidth=2)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    right.locator_params(axis="x", nbins=4)
    left.legend(title="learning rate", fontsize="small")
    left.set_xlabel("bits per byte after a quarter of the tokens")
    right.set_xlabel("bits per byte at the end (dots: seeds)")
    results.save_figure(figure)


def ran(results: record.Record, stage: str, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The contenders that have a run of a seed, failed ones too."""
    return [n for n in names if any(protocol.seed_cell(stage, n, seed) in results.cells for seed in seeds)]


def made(results: record.Record, stage: str, names: Sequence[str], seeds: Sequence[int]) -> str:
    """How many runs of the seeds there are; empty where all are."""
    found = sum(protocol.seed_cell(stage, name, seed) in results.cells for name in names for seed in seeds)
    whole = len(names) * len(seeds)
    return "" if found == whole else f" **{found} of {whole} runs have been made**; the command goes on."


def tables(
    results: record.Record, stage: str, contenders: dict[str, Contender], comparison: Protocol
) -> list[str | record.Table]:
    """Every contender's seeds and what it is apart from the first; then its rates."""
    names = list(contenders)
    base = protocol.reached(results, stage, names[0], comparison.seeds)
    by_seed, by_rate = [], []
    tried = _rates(results, stage, [name for name in names if not contenders[name].rate_of], comparison)
    for name in names:
        rates = [results.cells.get(protocol.rate_cell(stage, name, rate), {}) for rate in tried]
        searches = contenders[name].rate_of or name
        best = protocol.best_rate(results, stage, searches, comparison)
        if searches == name:
            by_rate.append((name, *map(said, rates), "" if best is None else f"{best:g}"))
        reached = protocol.reached(results, stage, name, comparison.seeds)
        seeds = [results.cells.get(protocol.seed_cell(stage, name, seed), {}) for seed in comparison.seeds]
        known = [b for b in reached if b is not None]
        apart = protocol.apart(base, reached) if name != names[0] else None
        against = (f"{apart[0]:+.3f}", apart[1]) if apart else ("", "")
        row = (name, contenders[name].asks, *map(said, seeds))
        if name in ran(results, stage, names, comparison.seeds):
            by_seed.append((*row, f"{mean(known):.3f}" if known else "", *against, _trained_at(seeds)))
    searched = comparison.steps // comparison.share
    seeds_head = (f"seed {seed}" for seed in comparison.seeds)
    return [
        record.Table(("contender", "asks", *seeds_head, "mean", "difference", "sign", "rate"), by_seed),
        f"Bits per byte at each learning rate, after {searched:,} steps, from the first seed:",
        record.Table(("contender", *(f"{rate:g}" for rate in tried), "taken"), by_rate),
    ]


def _rates(results: record.Record, stage: str, names: Sequence[str], comparison: Protocol) -> list[float]:
    """All rates at which any of the contenders was tried, ascending."""
    return sorted({rate for name in names for rate in protocol.rates_of(results, stage, name, comparison)})


def _trained_at(cells: Sequence[record.Cell]) -> str:
    """The learning rates that runs were given."""
    given = {word.removeprefix("train.lr=") for cell in cells for word in cell.get("words", ())}
    return ", ".join(sorted(rate for rate in given if rate[:1].isdigit()))


def said(cell: record.Cell) -> str:
    """Bits per byte; of a run that failed, the beginning of its message, which the JSON has whole."""
    reached, wrong = cell.get("bits_per_byte"), str(cell.get("wrong", ""))
    if reached is None:  # an empty cell where nothing was tried
        return wrong.partition("atlas-train: ")[2].partition(",")[0] or wrong
    return f"{reached:.3f}"


def seen(results: record.Record, stage: str, names: Sequence[str], seeds: Sequence[int], of: str = "") -> str:
    """Who is better than `of`, by default the first, and who is worse, by the signs of the differences."""
    of = of or names[0]
    base = protocol.reached(results, stage, of, seeds)
    begun = ran(results, stage, names, seeds)
    better, worse, open_yet = [], [], []
    for name in begun:
        difference, sign = protocol.apart(base, protocol.reached(results, stage, name, seeds)) or (0.0, "")
        decided = better if difference < 0 else worse
        if name != of:
            (decided if sign == "every seed" else open_yet).append(name)
    groups = {
        f"Better than {of} with every seed": better,
        f"Worse than {of} with every seed": worse,
        "Seeds disagree, or are too few": open_yet,
    }
    if of == names[0]:
        groups["Not run yet"] = [name for name in names if name not in begun]
    return " ".join(f"{group}: {'; '.join(found)}." for group, found in groups.items() if found)


def quarter(results: record.Record, stage: str, names: Sequence[str], comparison: Protocol) -> str:
    """The contenders by their bits after a quarter of the tokens, and whose best rate has no neighbour on one side."""
    best = {}
    for name in names:
        rate = protocol.best_rate(results, stage, name, comparison)
        if rate is not None:
            best[name] = results.cells[protocol.rate_cell(stage, name, rate)]["bits_per_byte"]
    order = sorted(best, key=lambda name: best[name])
    edge = [n for n in order if _at_edge(results, stage, n, comparison)]
    more = f" At the edge of the rates that were tried: {', '.join(edge)}." if edge else ""
    reached = "; ".join(f"{name} {best[name]:.3f}" for name in order)
    return f"After a quarter of the tokens, each at its best rate: {reached}.{more}"


def _at_edge(results: record.Record, stage: str, name: str, comparison: Protocol) -> bool:
    """Whether the best rate is the lowest or the highest of those with a run."""
    rates = protocol.rates_of(results, stage, name, comparison)
    known = [rate for rate in rates if protocol.rate_cell(stage, name, rate) in results.cells]
    return protocol.best_rate(results, stage, name, comparison) in (known[0], known[-1])
