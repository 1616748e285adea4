"""The gradient norm of every shipped configuration, at its own sequence length: at the start and in a hundred steps.

A memory's outer gradient is a product over all chunks of a sequence. The values that a configuration starts from have
to keep it near one, for every preset and size. This table holds each configuration to that.

Runs are in float32 on the quickstart's text (run `make quickstart` first). A step is one sequence, so norms are larger
than those of a full batch. Before the first step models are whole, up to 200M parameters. The hundred steps are of the
first two layers, four heads wide. Memory, chunk, period and length are the configuration's own. Warm-up takes 20 steps,
fewer than in any configuration.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from matplotlib import pyplot

from atlas_megatron.config import Config, load
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.training.metrics import METRICS, read
from experiments.shared import record

CONFIGS = record.ROOT / "configs"
QUICKSTART = CONFIGS / "quickstart.toml"
RUNS = record.ROOT / "runs" / "experiments" / "shipped_gradients"
STEPS, WARMUP = 100, 20
LARGEST = 200e6  # parameters of a whole model
HEADS, LAYERS = 4, 2
LOW, HIGH, HIGHEST = 0.1, 10.0, 50.0  # the bounds before the first step, and the largest of a hundred steps
LENGTHS = (512, 4096)  # of the presets


@dataclass(frozen=True)
class Row:
    """A configuration: a TOML file, and words that change it."""

    base: Path
    words: tuple[str, ...] = ()


def rows() -> dict[str, Row]:
    """Every shipped configuration that pretrains a memory, and every preset by the quickstart's."""
    files = [QUICKSTART, *sorted(CONFIGS.glob("atlas-*.toml")), *sorted((CONFIGS / "scale").glob("*.toml"))]
    files.append(CONFIGS / "experiments" / "language_model_gpu.toml")
    found = {str(file.relative_to(record.ROOT)): Row(file) for file in files}
    for preset in PRESETS:
        for length in LENGTHS:
            words = (f"memory.preset={preset}", f"model.seq_length={length}")
            found[f"quickstart, {preset}, {length} tokens"] = Row(QUICKSTART, words)
    return found


def whole(row: Row) -> list[str]:
    """One step of the whole model."""
    return [*row.words, *_common(row), "train.steps=1", "train.warmup_steps=0"]


def cut(row: Row) -> list[str]:
    """A hundred steps of its first layers, of a few heads."""
    config = load(row.base, row.words)
    width = HEADS * config.memory.head_dim
    words = [f"model.pattern={config.model.pattern[: 2 * LAYERS]}", f"model.hidden_size={width}"]
    words += [f"model.ffn_hidden_size={8 * width // 3}", f"memory.heads={HEADS}"]
    words += [f"attention.heads={HEADS}", f"attention.head_dim={width // HEADS}"]
    return [*row.words, *_common(row), *words, f"train.steps={STEPS}", f"train.warmup_steps={WARMUP}"]


def _common(row: Row) -> list[str]:
    """One process, one sequence a step, float32, the quickstart's text."""
    base, text = load(row.base, row.words), load(QUICKSTART)
    words = [f"model.vocab_size={text.model.vocab_size}", "model.tied_embeddings=true", "train.precision=float32"]
    words += ["train.global_batch=1", "train.micro_batch=1", f"train.min_lr={base.train.lr / 10}"]
    words += ["train.validate_every=0", "train.stats_every=1000000", "log.tensorboard=false", "checkpoint.every=1000"]
    words += [f"parallel.{axis}=1" for axis in ("tensor", "pipeline", "context")]
    words += ["data.validation=[]", f"data.tokenizer={text.data.tokenizer}"]
    return [*words, f"data.train={list(text.data.train)}"]


def shared(asked: dict[str, Row]) -> dict[str, str]:
    """The row whose hundred steps stand for each: of those with one memory, cut model and length that with the largest
    learning rate."""
    alike: dict[str, list[tuple[float, str]]] = {}
    for name, row in asked.items():
        config = load(row.base, cut(row))
        memory = replace(config.memory, preset="")
        same = f"{config.model} {memory} {config.attention if '*' in config.model.pattern else ''}"
        alike.setdefault(same, []).append((config.train.lr, name))
    return {name: max(group)[1] for group in alike.values() for _, name in group}


def measured(base: Path, words: list[str], directory: Path) -> record.Cell:
    """The gradient norm of every step, and whether all were finite."""
    shutil.rmtree(directory, ignore_errors=True)
    status = record.train_quietly([str(base), *words, f"run.directory={directory}"], directory)
    if status not in (0, 1):
        last = (directory / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1]
        raise ValueError(f"the run in {directory} did not train: {last}")
    norms = [r["grad_norm"] for r in read(directory)] if (directory / METRICS).is_file() else []
    shutil.rmtree(directory)
    return {"grad_norm": norms, "finite": status == 0, "words": words}


def jobs(asked: dict[str, Row]) -> dict[str, partial[record.Cell]]:
    """What trains each cell, by the cell's name."""
    found = {}
    runs = shared(asked)
    for name, row in asked.items():
        kinds = {first_cell(name): whole(row)} if _small(load(row.base, row.words)) else {}
        if runs[name] == name:
            kinds[hundred_cell(name)] = cut(row)
        for cell, words in kinds.items():
            directory = RUNS / "".join(letter if letter.isalnum() else "_" for letter in cell)
            found[cell] = partial(measured, row.base, words, directory)
    return found


def _small(config: Config) -> bool:
    from atlas_megatron.model.build import num_params

    return num_params(config) <= LARGEST


def first_cell(name: str) -> str:
    return f"{name}: before the first step"


def hundred_cell(name: str) -> str:
    return f"{name}: {STEPS} steps"


def draw(results: record.Record, asked: dict[str, Row]) -> None:
    """One row a configuration: the norms of its steps as a line, the one before the first step as a dot."""
    runs = shared(asked)
    with pyplot.style.context(record.STYLE):
        figure, axes = pyplot.subplots(figsize=(8, 0.26 * len(asked) + 1.2), layout="constrained")
        for place, name in enumerate(asked):
            norms = results.cells[hundred_cell(runs[name])]["grad_norm"]
            if norms:
                axes.plot([min(norms), max(norms)], [place, place], color="C0", linewidth=3, alpha=0.5)
            first = results.cells.get(first_cell(name), {}).get("grad_norm")
            if first:
                axes.plot(first[0], place, "o", color="C1")
        axes.axvspan(LOW, HIGH, color="grey", alpha=0.15)
        axes.axvline(HIGHEST, color="grey", linestyle=":")
        axes.set_xscale("log")
        axes.set_yticks(range(len(asked)), list(asked), fontsize="small")
        axes.invert_yaxis()
        axes.set_xlabel("gradient norm (dot: whole model, before the first step; bar: a hundred steps)")
        results.save_figure(figure)


def describe(results: record.Record, asked: dict[str, Row]) -> None:
    """The page: the norms of every configuration, and what lies outside of the bounds."""
    rows, outside, runs = [], [], shared(asked)
    for name, row in asked.items():
        hundred = results.cells[hundred_cell(runs[name])]
        norms = hundred["grad_norm"]
        first = results.cells.get(first_cell(name), {}).get("grad_norm", [])
        before = f"{first[0]:.2f}" if first else ""
        largest = f"{max(norms):.2f}" if hundred["finite"] else f"not finite after {len(norms)} steps"
        starts = [*first[:1], *norms[:1]]
        if not hundred["finite"] or max(norms) > HIGHEST or not all(LOW <= norm <= HIGH for norm in starts):
            outside.append(name)
        own = f"{norms[0]:.2f}" if norms else ""
        rows.append((name, f"{load(row.base, row.words).model.seq_length:,}", before, own, largest))
    head = ("configuration", "tokens", "before the first step", "two layers: first", f"largest of {STEPS}")
    bounds = f"The bounds are {LOW} to {HIGH:.0f} before the first step, and {HIGHEST:.0f} in the first {STEPS} steps. "
    said = f"Outside of them: {', '.join(outside)}." if outside else "All are within them."
    results.write_text(
        "The gradient norm of every shipped configuration",
        "Gradient norm of one sequence of each shipped configuration's own length, in float32, one seed. *Before the "
        f"first step*: the whole model, where it has no more than {LARGEST / 1e6:.0f}M parameters. *Two layers*: its "
        f"first two, {HEADS} heads wide; rows that differ in their rate alone share the run of the largest.",
        [record.Table(head, rows)],
        [bounds + said],
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run what is missing, then draw and describe."""

    def experiment() -> None:
        asked = record.options("shipped_gradients", __doc__ or "", words)
        every = rows()
        chosen = dict(list(every.items())[:1]) if asked.quick else every
        if not Path(f"{load(QUICKSTART).data.train[0]}.idx").is_file():
            raise ValueError(f"{load(QUICKSTART).data.train[0]}.idx is missing; run make quickstart once")
        results = record.Record("shipped_gradients", asked, {"steps": STEPS, "warmup": WARMUP, "heads": HEADS})
        record.side_by_side(results, jobs(chosen))
        draw(results, chosen)
        describe(results, chosen)

    return record.run("shipped_gradients", experiment)


if __name__ == "__main__":
    sys.exit(main())
