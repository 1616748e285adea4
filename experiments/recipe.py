"""The recipe of ATLAS, searched: norm, retention, step, period and more, each hypothesis in a run of its own.

    screen    recipe_rows.SCREEN on bytes, with a model of 0.5M parameters and half a million tokens a row. A row takes
              two to five minutes on a core. It changes one thing of the recipe; all rows have the recipe's parameters.
    confirm   language_model.py compares what is left, the members and the baselines, at the quickstart's size.

Everything that was tried is in the table, failures too. A cell is kept as it ends and never trained twice: interrupt
the search and call it again. The quickstart's corpus is needed as bytes, and is made at the first call.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib import pyplot

from atlas_megatron.config import load
from atlas_megatron.data.corpus import standard_library
from experiments.recipe_rows import EXCLUDED, HYPOTHESES, SCREEN
from experiments.shared import protocol, record
from experiments.shared.protocol import Protocol

BASE = record.ROOT / "configs" / "experiments" / "recipe_screen.toml"
RUNS = record.ROOT / "runs" / "experiments" / "recipe"
SEEDS = (1, 2)
STEPS = 250
QUICK = ("atlas", "norm = layer")
STAGE = "screen"
BYTES = 257  # vocabulary: 256 bytes, and the end of a text
CORPUS_BYTES, HELD_OUT = 10_000_000, 0.04  # of the standard library, as in the quickstart


def prepare_bytes() -> None:
    """The quickstart's corpus as bytes, where the base looks for it."""
    from atlas_megatron.data.prepare import Options, is_own, prepare

    folder = Path(load(BASE).data.train[0]).parent
    options = Options(train_vocab=BYTES, validation=HELD_OUT, workers=len(os.sched_getaffinity(0)))
    files = [str(file) for file in standard_library(CORPUS_BYTES)]
    prepare(files, folder, options, lambda stage, size: None, overwrite=is_own(folder, BYTES))


def draw(results: record.Record, names: Sequence[str], seeds: Sequence[int]) -> None:
    """One row a contender, best first: every seed a dot, their mean a line."""
    found = {name: [b for b in protocol.reached(results, STAGE, name, seeds) if b is not None] for name in names}
    ordered = sorted((name for name in names if found[name]), key=lambda name: mean(found[name]))
    figure, axes = pyplot.subplots(figsize=(8.5, 0.24 * len(ordered) + 1.3), layout="constrained")
    for row, name in enumerate(ordered):
        colour = "C1" if name == names[0] else "C0"
        axes.plot(found[name], [row] * len(found[name]), "o", color=colour, alpha=0.6, markersize=4)
        axes.plot([mean(found[name])] * 2, [row - 0.35, row + 0.35], color=colour, linewidth=2)
    if found[names[0]]:
        axes.axvline(mean(found[names[0]]), color="C1", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(ordered)), ordered, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("validation bits per byte (dots: seeds)")
    results.save_figure(figure)


def table(results: record.Record, names: Sequence[str], seeds: Sequence[int]) -> record.Table:
    """Every row of the search, best first, failures last."""
    base = protocol.reached(results, STAGE, names[0], seeds)
    rows = []
    for name in names:
        reached = protocol.reached(results, STAGE, name, seeds)
        cells = [results.cells.get(protocol.seed_cell(STAGE, name, seed)) for seed in seeds]
        wrong = [cell["wrong"] for cell in cells if cell and "wrong" in cell]
        apart = None if name == names[0] else protocol.apart(base, reached)
        norms = [cell["largest_gradient_norm"] for cell in cells if cell and "largest_gradient_norm" in cell]
        place = mean([b for b in reached if b is not None] or [float("inf")])
        asks = SCREEN[name].asks + (f" ({wrong[0]})" if wrong else "")
        by_seed = ("" if b is None else f"{b:.3f}" for b in reached)
        against = (f"{apart[0]:+.3f}", apart[1]) if apart else ("", "")
        rows.append((place, (name, asks, *by_seed, *against, f"{max(norms):.3g}" if norms else "")))
    head = ("row", "asks", *(f"seed {seed}" for seed in seeds), "difference", "sign", "largest gradient norm")
    return record.Table(head, [row for _, row in sorted(rows, key=lambda row: row[0])])


def describe(results: record.Record, names: Sequence[str], seeds: Sequence[int], steps: int, rows: int) -> None:
    """The page of what is there, of so many rows."""
    config = load(BASE, SCREEN[names[0]].words)
    tokens = steps * config.train.global_batch * config.model.seq_length
    hypotheses = record.Table(("hypothesis", "about"), [(str(number), said) for number, said in HYPOTHESES.items()])
    results.write_text(
        "The recipe, searched",
        f"Bits per byte of held-out Python sources after {tokens:,} bytes, from {record.seeds_said(seeds)}. Models "
        f"have {protocol.parameters(config):,} parameters (within 1 %) and the pattern {config.model.pattern}, where "
        f"the row names no other. Sequences have {config.model.seq_length} bytes; there is one learning rate. A number "
        f"under *asks* is a hypothesis of the last table. *Difference*: the row's bits less those of {names[0]}, so "
        "less than zero is better. *Sign*: whether every seed has the difference's. The words of each row are in the "
        f"JSON. {_missing(names, rows)}",
        [table(results, names, seeds), "The hypotheses of the search:", hypotheses, EXCLUDED],
        _seen(results, names, seeds),
    )


def _seen(results: record.Record, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The best row and the last one; how many differences have one sign in every seed."""
    base = protocol.reached(results, STAGE, names[0], seeds)
    differences = {name: protocol.apart(base, protocol.reached(results, STAGE, name, seeds)) for name in names[1:]}
    found = {name: difference for name, difference in differences.items() if difference is not None}
    if not found:
        return []
    best, last = (choose(found, key=lambda name: found[name][0]) for choose in (min, max))
    several = [sign for _, sign in found.values() if sign != "one seed"]
    alike = several.count("every seed")
    decided = f"Of {len(several)} differences of several seeds, {alike} have one sign in every seed."
    return [
        f"The lowest of the other rows is *{best}*, at {found[best][0]:+.3f} from {names[0]}. The highest is *{last}*, "
        f"at {found[last][0]:+.3f}. {decided if several else 'No row has several seeds yet.'}"
    ]


def _missing(names: Sequence[str], rows: int) -> str:
    return f"{rows - len(names)} of {rows} rows have not been trained yet." if len(names) < rows else ""


def main(words: Sequence[str] | None = None) -> int:
    """Train what is missing, then draw and describe."""

    def experiment() -> None:
        asked = record.options("recipe", __doc__ or "", words, reports=True)
        names = QUICK if asked.quick else tuple(SCREEN)
        seeds, steps = ((1,), 3) if asked.quick else (SEEDS, STEPS)
        contenders = {name: SCREEN[name] for name in names}
        # The rows are no settings: the search may grow by them.
        results = record.Record("recipe", asked, {"steps": steps, "base": BASE.read_text(encoding="utf-8")})
        more = ("train.validate_sequences=8",) if asked.quick else ()
        if not asked.report:
            prepare_bytes()
            protocol.compare(results, STAGE, Protocol(BASE, more, steps, (), seeds, RUNS), contenders)
        trained = [n for n in names if any(protocol.seed_cell(STAGE, n, seed) in results.cells for seed in seeds)]
        draw(results, trained, seeds)
        describe(results, trained, seeds, steps, len(names))

    return record.run("recipe", experiment)


if __name__ == "__main__":
    sys.exit(main())
