"""What a comparison of language models shows: a picture, a table by seed, a table by rate, and who is ahead."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from matplotlib import pyplot

from experiments.shared import protocol, record
from experiments.shared.protocol import Contender, Protocol


def draw(results: record.Record, stage: str, names: Sequence[str], seeds: Sequence[int]) -> None:
    """One row a contender: every seed a dot, their mean a line."""
    figure, axes = pyplot.subplots(figsize=(7.5, 0.32 * len(names) + 1.3), layout="constrained")
    for row, name in enumerate(names):
        found = [b for b in protocol.reached(results, stage, name, seeds) if b is not None]
        axes.plot(found, [row] * len(found), "o", color="C0", alpha=0.6, markersize=4)
        if found:
            axes.plot([mean(found)] * 2, [row - 0.3, row + 0.3], color="C0", linewidth=2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("validation bits per byte (dots: seeds)")
    results.save_figure(figure)


def tables(
    results: record.Record, stage: str, contenders: dict[str, Contender], comparison: Protocol
) -> list[str | record.Table]:
    """Every contender's seeds and what it is apart from the first; then its rates."""
    names = list(contenders)
    base = protocol.reached(results, stage, names[0], comparison.seeds)
    by_seed, by_rate = [], []
    for name in names:
        rates = [results.cells.get(protocol.rate_cell(stage, name, rate), {}) for rate in comparison.rates]
        searches = contenders[name].rate_of or name
        best = protocol.best_rate(results, stage, searches, comparison)
        searched = map(_said, rates) if searches == name else (f"as {searches}" for _ in rates)
        by_rate.append((name, *searched, "" if best is None else f"{best:g}"))
        reached = protocol.reached(results, stage, name, comparison.seeds)
        seeds = [results.cells.get(protocol.seed_cell(stage, name, seed), {}) for seed in comparison.seeds]
        known = [b for b in reached if b is not None]
        apart = protocol.apart(base, reached) if name != names[0] else None
        against = (f"{apart[0]:+.3f}", apart[1]) if apart else ("", "")
        row = (name, contenders[name].asks, *map(_said, seeds))
        by_seed.append((*row, f"{mean(known):.3f}" if known else "", *against))
    seeds_head = (f"seed {seed}" for seed in comparison.seeds)
    return [
        record.Table(("contender", "asks", *seeds_head, "mean", "difference", "sign"), by_seed),
        "Bits per byte at each learning rate, after a quarter of the tokens, from the first seed:",
        record.Table(("contender", *(f"{rate:g}" for rate in comparison.rates), "taken"), by_rate),
    ]


def _said(cell: record.Cell) -> str:
    reached = cell.get("bits_per_byte")
    return str(cell.get("wrong", "not run")) if reached is None else f"{reached:.3f}"


def seen(results: record.Record, stage: str, names: Sequence[str], seeds: Sequence[int]) -> str:
    """Who is better than the first and who is worse, by the signs of the differences."""
    base = protocol.reached(results, stage, names[0], seeds)
    better, worse, open_yet = [], [], []
    for name in names[1:]:
        difference, sign = protocol.apart(base, protocol.reached(results, stage, name, seeds)) or (0.0, "")
        decided = better if difference < 0 else worse
        (decided if sign == "every seed" else open_yet).append(name)
    first = names[0]
    groups = {
        f"Better than {first} with every seed": better,
        f"Worse than {first} with every seed": worse,
        "Seeds disagree, or are too few": open_yet,
    }
    return " ".join(f"{said}: {'; '.join(found) or 'none'}." for said, found in groups.items())
