"""Language modelling at equal parameters and tokens: the paper's ablations (its Table 6) and the baselines.

Every variant is configs/quickstart.toml with a few keys changed, trained by `atlas-train` on the quickstart's corpus
(run `make quickstart` first, or tools/prepare_data.py), two side by side on two cores; the MLPs are widened or narrowed
until each has the first variant's parameters. Reported: bits per byte of the held-out text after the last step, for
every seed. Where there is a GPU, configs/experiments/language_model_gpu.toml is the base instead, with its own data and
steps.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
from matplotlib import pyplot

import record
from atlas_megatron.config import Config, load
from atlas_megatron.metrics import read

GPU = torch.cuda.is_available()
BASE = record.ROOT / "configs" / ("experiments/language_model_gpu.toml" if GPU else "quickstart.toml")
RUNS = record.ROOT / "runs" / "experiments" / "language_model"
SEEDS = (1, 2, 3)
STEPS = 20000 if GPU else 120
# A CPU's few tokens teach more in many small steps, at a lower rate.
SMALL = () if GPU else ("train.global_batch=4", "train.micro_batch=4", "train.lr=2e-3")
VALIDATED = 256 if GPU else 88  # sequences; of the quickstart's, half of the held-out text
# What each variant changes; the first is what the others are compared with and sized by. A pattern of three blocks is
# repeated as often as the base's.
VARIANTS: dict[str, tuple[str, ...]] = {
    "atlas": (),
    "without Muon (OmegaNet)": ("memory.preset=omeganet",),
    "c = 1": ("memory.window=1",),
    "without phi": ("memory.feature_map=identity",),
    "linear memory": ("memory.memory=linear", "memory.norm=none"),
    "gated memory (atlas++)": ("memory.memory=gated_mlp",),
    "MAG": ("model.pattern=A-A-A-",),
    "MAL": ("model.pattern=M-*-M-*-",),
    "MAC": ("model.pattern=C-C-C-",),
    "titans": ("memory.preset=titans",),
    "attention (Transformer++)": ("model.pattern=F-F-F-",),
    "sliding window": ("model.pattern=*-*-*-",),
    "DeltaNet": ("model.pattern=D-*-D-",),
    "Gated DeltaNet": ("model.pattern=G-*-G-",),
    "GRU": ("model.pattern=R-*-R-",),
    "LSTM": ("model.pattern=L-*-L-",),
}
QUICK = ("atlas", "attention (Transformer++)")


def words_of(variant: str, steps: int) -> list[str]:
    """The changes of a variant, its MLPs as wide as makes it equal to the first in parameters."""
    short = [f"train.steps={steps}", f"train.warmup_steps={steps // 10}", f"train.validate_every={steps}"]
    short += [f"train.validate_sequences={VALIDATED}", f"checkpoint.every={steps}", "log.tensorboard=false"]
    short += [*SMALL, "train.stats_every=1000000"]  # measuring costs a second read of every memory
    repeats = load(BASE).model.pattern.count("M-*-M-")
    own = [*short, *(_repeated(word, repeats) for word in VARIANTS[variant])]
    wanted = _parameters(load(BASE, short))
    config = load(BASE, own)
    one, two = (_parameters(_with_mlp(config, width)) for width in (8, 16))
    width = max(8, round(8 + (wanted - one) / ((two - one) / 8)))
    return [*own, f"model.ffn_hidden_size={width}"]


def _repeated(word: str, times: int) -> str:
    key, _, value = word.partition("=")
    return f"{key}={value * times}" if key == "model.pattern" else word


def _parameters(config: Config) -> int:
    from atlas_megatron.model import num_params

    return num_params(config)


def _with_mlp(config: Config, width: int) -> Config:
    return replace(config, model=replace(config.model, ffn_hidden_size=width))


def job_of(variant: str, seed: int, steps: int, more: Sequence[str]) -> partial[record.Cell]:
    """What trains one variant from one seed; it has all that it needs, for another process."""
    name = "".join(letter if letter.isalnum() else "_" for letter in variant)
    directory = RUNS / f"{name}_{seed}_{steps}"
    return partial(trained, BASE, [*words_of(variant, steps), f"run.seed={seed}", *more], directory)


def trained(base: Path, words: list[str], directory: Path) -> record.Cell:
    """Train one variant; bits per byte of the held-out text, speed and size."""
    words = [*words, f"run.directory={directory}"]
    if record.train_quietly([str(base), *words], directory):
        raise ValueError(f"the run in {directory} did not train to its end; its log.txt says why")
    records, config = read(directory), load(base, words)
    last = records[-1]
    # The cell is the result; a run that is asked for again begins again.
    shutil.rmtree(directory / "checkpoints")
    return {
        "bits_per_byte": last["validation_bits_per_byte"],
        "loss": last["validation_loss"],
        "parameters": _parameters(config),
        "tokens": last["tokens"],
        "tokens_per_second": round(median(r["tokens_per_second"] for r in records)),
        "changes": words[:-1],
    }


def draw(results: record.Record, variants: Sequence[str], seeds: Sequence[int]) -> None:
    """One row a variant: every seed a dot, their mean a line."""
    figure, axes = pyplot.subplots(figsize=(7.5, 0.32 * len(variants) + 1.3), layout="constrained")
    for row, variant in enumerate(variants):
        found = [results.cells[f"{variant}, seed {seed}"]["bits_per_byte"] for seed in seeds]
        axes.plot(found, [row] * len(found), "o", color="C0", alpha=0.6, markersize=4)
        axes.plot([mean(found)] * 2, [row - 0.3, row + 0.3], color="C0", linewidth=2)
    axes.set_yticks(range(len(variants)), variants)
    axes.invert_yaxis()
    axes.set_xlabel("validation bits per byte (dots: seeds)")
    results.save_figure(figure)


def describe(results: record.Record, variants: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """What was seen, from the numbers."""
    by_variant = {v: [results.cells[f"{v}, seed {s}"]["bits_per_byte"] for s in seeds] for v in variants}
    base = by_variant[variants[0]]
    spread = max(max(found) - min(found) for found in by_variant.values())
    better, worse, unclear = [], [], []
    for variant in variants[1:]:
        apart = [b - a for a, b in zip(base, by_variant[variant], strict=True)]
        said = f"{variant} {mean(apart):+.3f}"
        (better if max(apart) < 0 else worse if min(apart) > 0 else unclear).append(said)
    first = results.cells[f"{variants[0]}, seed {seeds[0]}"]
    return [
        f"{variants[0]}: {mean(base):.3f} bits per byte after {first['tokens']:,} tokens, {first['parameters']:,} "
        f"parameters; every variant has as many within {_largest_gap(results):.1%}. Seeds of one variant differ by "
        f"{spread:.3f} at most.",
        f"Against it, bits per byte with the same seed: better with every seed: {', '.join(better) or 'none'}; worse "
        f"with every seed: {', '.join(worse) or 'none'}; seeds disagree: {', '.join(unclear) or 'none'}.",
        "So few tokens say how fast each variant begins to learn, not where it would end; the paper's order (Table 6, "
        "760M parameters, 30B tokens) is another question, for which the same variants lie ready at a GPU's size.",
    ]


def _largest_gap(results: record.Record) -> float:
    counts = [cell["parameters"] for cell in results.cells.values()]
    return max(abs(count / counts[0] - 1) for count in counts)


def main(words: Sequence[str] | None = None) -> int:
    """Train what is missing, then draw and describe."""

    def experiment() -> None:
        asked = record.options("language_model", __doc__ or "", words)
        variants = QUICK if asked.quick else tuple(VARIANTS)
        seeds, steps = ((1,), 3) if asked.quick else (SEEDS, STEPS)
        more = ["train.validate_sequences=4"] if asked.quick else []
        if not Path(f"{load(BASE).data.train[0]}.idx").is_file():
            raise ValueError(f"{load(BASE).data.train[0]}.idx is missing; run make quickstart once, which prepares it")
        settings = {"steps": steps, "small": SMALL, "seeds": seeds, "variants": {v: VARIANTS[v] for v in variants}}
        results = record.Record("language_model", asked, settings)
        # Seed by seed: an interrupted run has compared everything at least once.
        names = [(seed, variant) for seed in seeds for variant in variants]
        jobs = {f"{variant}, seed {seed}": job_of(variant, seed, steps, more) for seed, variant in names}
        record.side_by_side(results, jobs)
        draw(results, variants, seeds)
        results.write_text("Language modelling at equal parameters and tokens", describe(results, variants, seeds))

    return record.run("language_model", experiment)


if __name__ == "__main__":
    sys.exit(main())
