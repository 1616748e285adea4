"""Loss against compute on the smallest rungs of the ladder: the paper's memory, OmegaNet's, attention.

Every cell is one rung of atlas_megatron/scaling/ladder.py in one kind of model. `atlas-train` trains it on the
quickstart's corpus (run `make quickstart` first). All kinds of a rung have its width, depth and parameters. They see
the same tokens in the same order.

Reported is the validation loss after the last step against training compute. There is a curve through each kind's
rungs, with error bars, and the kinds' gap at equal compute. The fits are those of tools/scaling.py.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from atlas_megatron import train
from atlas_megatron.config import Config, to_toml
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.scaling import compare as scaling
from atlas_megatron.scaling import ladder
from experiments.shared import record

RUNS = record.ROOT / "runs" / "experiments" / "scaling"
SETTING = ladder.CPU
RUNGS = ("0.15M", "0.3M", "0.6M", "1.2M")
# The mixer's symbol and the preset of each kind. A rung's own preset is atlas with one orthogonalised write a chunk.
KINDS = {"atlas": ("M", "atlas"), "omeganet": ("M", "omeganet"), "attention": ("F", "atlas")}
# The usual 20 would take too long. 1.0 takes 40 minutes on two cores, and the models have only begun to learn.
TOKENS_PER_PARAMETER = 1.0
QUICK_RUNGS, QUICK_KINDS, QUICK_STEPS = RUNGS[:3], ("atlas", "omeganet"), 3


def config_of(kind: str, rung: str, *, quick: bool) -> Config:
    """The rung as this kind of model, in a directory of its own."""
    symbol, preset = KINDS[kind]
    config = ladder.rung(rung, tokens_per_parameter=TOKENS_PER_PARAMETER, symbol=symbol, setting=SETTING)
    if preset != config.memory.preset:
        config = replace(config, memory=replace(config.memory, preset=preset, **PRESETS[preset]))
    steps = QUICK_STEPS if quick else config.train.steps
    batch = config.train.micro_batch if quick else config.train.global_batch
    sequences = 2 * config.train.micro_batch if quick else config.train.validate_sequences
    return replace(
        config,
        run=replace(config.run, directory=str(RUNS / f"{kind}_{rung}{'_quick' if quick else ''}")),
        train=replace(
            config.train,
            steps=steps,
            global_batch=batch,
            warmup_steps=min(config.train.warmup_steps, steps - 1),
            validate_every=steps,
            validate_sequences=sequences,
            # Measuring costs a second read of every memory.
            stats_every=1000000,
        ),
        checkpoint=replace(config.checkpoint, every=max(1, steps // 4), keep=1),
        log=replace(config.log, tensorboard=False),
    )


def trained(kind: str, rung: str, *, quick: bool) -> record.Cell:
    """Train one cell, or go on where it stopped; the finished run as a point of a curve."""
    config = config_of(kind, rung, quick=quick)
    directory = Path(config.run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "rung.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    if train.main([str(path)]):
        raise ValueError(f"{kind}, {rung} did not train to its end; its last lines say why")
    (run,) = scaling.read_runs([directory])
    # The cell is the result; a run that is asked for again begins again.
    shutil.rmtree(directory / "checkpoints")
    model, steps = config.model, config.train
    shape: dict[str, Any] = {"width": model.hidden_size, "pattern": model.pattern, "mlp": model.ffn_hidden_size}
    shape |= {"batch": steps.global_batch, "steps": steps.steps, "lr": steps.lr}
    return {**vars(run), "directory": f"{kind}, {rung}", "kind": kind, **shape}


def kinds_of(results: record.Record, kinds: Sequence[str], rungs: Sequence[str]) -> list[scaling.Kind]:
    """The cells as points of curves."""
    names = scaling.Run.__annotations__
    cells = [results.cells[f"{kind}, {rung}"] for kind in kinds for rung in rungs]
    return scaling.kinds_of([scaling.Run(**{name: cell[name] for name in names}) for cell in cells])


# Of the full ladder; the numbers behind it are in the JSON.
OBSERVED = (
    """On the two smaller rungs, of at most 301,056 tokens, both memories are ahead of attention by 0.3 to 0.8 nats. On
    the two larger rungs omeganet is ahead by 0.1. There atlas, which writes once a chunk here, is behind by less than
    that. The memories' gradient norms stay below 3.4.""",
    """These are runs of the former recipe: the memories had an output norm and a damped gradient. They read one token a
    parameter, where the ladder's own configurations read twenty. All kinds have one learning rate, 2.8e-3.""",
)


def describe(
    results: record.Record, kinds: Sequence[scaling.Kind], rungs: Sequence[str], observed: Sequence[str]
) -> None:
    """The page: every run's loss, the curve through each kind, and the kinds at equal compute."""
    runs = [run for kind in kinds for run in kind.runs]
    losses = [
        (rung, f"{alike[0].tokens:,}", *(f"{run.loss:.3f}" for run in alike))
        for rung, alike in zip(rungs, zip(*(kind.runs for kind in kinds), strict=True), strict=True)
    ]
    found = scaling.content(kinds, "compute")
    gaps = [gap for gap in found["gaps"] if not isinstance(gap, str)]
    results.write_text(
        "Loss against compute on the smallest rungs",
        "Validation loss in nats a token after the last step, one seed each. The rungs have "
        f"{min(run.parameters for run in runs):,} to {max(run.parameters for run in runs):,} parameters without the "
        "embedding. Compute C counts every product, the memories' inner loop included.",
        [
            record.Table(("rung", "tokens", *(kind.name for kind in kinds)), losses),
            "Curves L = E + A C^-a. *Inner loop*: its share of the largest rung's compute.",
            _curves(kinds, found["kinds"]),
            f"The other kinds beside {kinds[0].name} at equal compute. Where the error bar holds 0, no difference is "
            "seen.",
            *([_gaps(gaps)] if gaps else []),
            *(f"{gap}." for gap in found["gaps"] if isinstance(gap, str)),
            f"{scaling.METHOD}. There is one seed a point. So the bars hold the curves' lack of fit, and not what "
            "another seed would do. So small a range says little of the paper's sizes.",
        ],
        observed,
    )


def _curves(kinds: Sequence[scaling.Kind], numbers: dict[str, Any]) -> record.Table:
    rows = []
    for kind in kinds:
        curve, inner = numbers[kind.name]["curve"], f"{100 * kind.runs[-1].inner:.0f}"
        if "none" in curve:
            rows.append((kind.name, inner, *[""] * 5, curve["none"]))
            continue
        fitted = (f"{curve['E']:.3f}", "{:.3g} to {:.3g}".format(*curve["E_80_percent"]), f"{curve['A']:.4g}")
        fitted += (f"{curve['a']:.3f}", "{:.3g} to {:.3g}".format(*curve["a_80_percent"]))
        rows.append((kind.name, inner, *fitted, "; ".join(curve["notes"])))
    return record.Table(("kind", "inner loop, %", "E", "80 % of E", "A", "a", "80 % of a", "remarks"), rows)


def _gaps(gaps: Sequence[dict[str, Any]]) -> record.Table:
    first, rows = gaps[0]["first"], []
    for gap in gaps:
        low, high = gap["interval"]
        times = f"{1 / gap['ratio']:.3g}" if gap["ratio"] else ""
        said = (f"{gap['at']:.3g}", f"{gap['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}")
        rows.append((gap["second"], *said, times))
    head = ("kind", "C", f"nats beside {first}", "80 %", f"{first} has this loss at so many times C")
    return record.Table(head, rows)


def main(words: Sequence[str] | None = None) -> int:
    """Train what is missing, then fit, draw and describe."""

    def experiment() -> None:
        asked = record.options("scaling", __doc__ or "", words)
        rungs, kinds = (QUICK_RUNGS, QUICK_KINDS) if asked.quick else (RUNGS, tuple(KINDS))
        if not Path(f"{SETTING.data}/train.idx").is_file():
            raise ValueError(f"{SETTING.data}/train.idx is missing; run make quickstart once, which prepares it")
        settings = {"tokens_per_parameter": TOKENS_PER_PARAMETER, "rungs": rungs, "ladder": vars(SETTING)}
        results = record.Record("scaling", asked, {**settings, "kinds": {kind: KINDS[kind] for kind in kinds}})
        # Rung by rung: an interrupted run has compared the kinds as far as it came.
        for rung in rungs:
            for kind in kinds:
                results.cell(f"{kind}, {rung}", lambda k=kind, r=rung: trained(k, r, quick=asked.quick))
        found = kinds_of(results, kinds, rungs)
        with pyplot.style.context(record.STYLE):
            figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
            scaling.draw(axes, found, "compute")
            results.save_figure(figure)
        describe(results, found, rungs, () if asked.quick else OBSERVED)

    return record.run("scaling", experiment)


if __name__ == "__main__":
    sys.exit(main())
