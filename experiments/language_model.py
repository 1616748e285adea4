"""Language modelling at equal parameters and tokens: ATLAS, every member, ablations, baselines, outer optimizers.

Every contender is configs/experiments/language_model.toml, the quickstart's model, with a few keys changed.
`atlas-train` trains it on the quickstart's corpus: run `make quickstart` first, or tools/prepare_data.py. Its MLPs are
as wide as makes it equal to the first contender in parameters. AdamW trains all but those whose name says Muon, which
need `pip install emerging-optimizers==0.3.0` and are compared after a quarter of the tokens. A contender trains at
three learning rates for a quarter of the tokens, then at the best of them from three seeds. One that changes a single
thing of another takes the other's rate. Reported: bits per byte of the held-out text after the last step, and whether a
difference has one sign in every seed. Where there is a GPU, configs/experiments/language_model_gpu.toml is the base,
with its own data and steps.

On two cores, two runs side by side, the whole of it takes about thirteen hours, by estimate. A cell is kept as it ends;
interrupt it and call it again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from atlas_megatron.config import TrainConfig, load, uses
from experiments.recipe_rows import OURS
from experiments.shared import protocol, record, standings
from experiments.shared.protocol import Contender, Protocol

GPU = torch.cuda.is_available()
BASE = record.ROOT / "configs" / "experiments" / ("language_model_gpu.toml" if GPU else "language_model.toml")
RUNS = record.ROOT / "runs" / "experiments" / "language_model"
STAGE, OUTER = "members", "optimizers"
SEEDS = (1, 2, 3)
STEPS = 20000 if GPU else 1000
RATES = (1e-3, 2e-3, 4e-3) if GPU else (1.5e-3, 3e-3, 6e-3)
VALIDATED = 256 if GPU else 176  # sequences; 176 are all of the quickstart's held-out text
# Measuring costs a second read of every memory.
WORDS = (f"train.validate_sequences={VALIDATED}", "train.stats_every=1000000", "log.tensorboard=false")
SILENCED = "train.validate_silenced=true"  # what the memories contribute
# Members that write raw gradients take fresher anchors. With ATLAS they make the exact outer gradient explode.
CHUNK_16, DAMPED = "memory.chunk=16", "memory.anchor_gradient=0.3"
FREE = "memory.residual=false"
EVERY_8 = "atlas, a write every 8 tokens"
DRAWN = ("memory.late_keys=false", "memory.open_gate=false", "memory.copy_start=false")
# The others are compared with the first and have its parameters. A pattern of three blocks is repeated as often as the
# base's. ATLAS is here with four periods. OmegaNet writes at every token; with one write a chunk, ATLAS could not read
# what its own chunk holds.
CONTENDERS: dict[str, Contender] = {
    "atlas": Contender(asks="a write every 16 tokens"),
    "atlas++": Contender(("memory.preset=atlas++",), "the paper's gated memory, without residual"),
    "atlas without residual": Contender((FREE,), "M(x) = W1 act(W2 x), and the start of W1 that follows"),
    "OmegaNet": Contender(("memory.preset=omeganet", CHUNK_16), "without Muon; a write a token"),
    "titans": Contender(("memory.preset=titans", CHUNK_16), "a write a token"),
    "OmegaNet without residual": Contender(("memory.preset=omeganet", CHUNK_16, FREE), "does it gain too?"),
    "titans without residual": Contender(("memory.preset=titans", CHUNK_16, FREE), "does it gain too?"),
    "Gated DeltaNet": Contender(("model.pattern=G-*-G-", "delta.head_dim=32"), "baseline"),
    "Gated DeltaNet, our starts": Contender(
        ("model.pattern=G-*-G-", "delta.head_dim=32", *OURS), "baseline, with the memories' starts"
    ),
    "attention (Transformer++)": Contender(("model.pattern=F-F-F-",), "baseline"),
    "sliding window": Contender(("model.pattern=*-*-*-",), "baseline"),
    "DeltaNet": Contender(("model.pattern=D-*-D-", "delta.head_dim=32"), "baseline"),
    # What follows changes one thing, and takes the learning rate of what it changes.
    "OmegaNet, chunk 64": Contender(("memory.preset=omeganet",), "older anchors", rate_of="OmegaNet"),
    "titans, chunk 64": Contender(("memory.preset=titans",), "older anchors", rate_of="titans"),
    "atlas, a write a chunk": Contender(
        ("memory.ns_period=64",), "the period, and the retention that follows from it", rate_of="atlas"
    ),
    EVERY_8: Contender(("memory.ns_period=8",), "the period", rate_of="atlas"),
    "atlas, three steps": Contender(("memory.ns_steps=3",), "the steps of Newton-Schulz, of five"),
    "atlas, a write every 4 tokens of two steps": Contender(
        ("memory.ns_period=4", "memory.ns_steps=2"), "more writes, each of fewer steps"
    ),
    "atlas, chunk 16": Contender(
        (CHUNK_16, DAMPED), "fresher anchors, damped; the retention that follows", rate_of="atlas"
    ),
    "atlas, twice the step": Contender(("memory.eta_per_token=0.01",), "the step of a write", rate_of="atlas"),
    "atlas, starts as drawn": Contender(DRAWN, "keys, output gate and values as drawn", rate_of="atlas"),
    "c = 1": Contender(("memory.window=1",), "the paper's Table 6", rate_of="atlas"),
    "without phi": Contender(("memory.feature_map=identity",), "the paper's Table 6", rate_of="atlas"),
    "linear memory": Contender(
        ("memory.network=linear", "memory.norm=none"), "the paper's Table 6", rate_of="atlas"
    ),
}
QUICK = ("atlas",)
# ATLAS by outer optimizer, after a quarter of the tokens: about those of the quickstart. With
# train.muon_extra_scale_factor = 0.2 an update of Muon is as large as one of AdamW: the same rates suit both.
MUON = "train.optimizer=muon"
OPTIMIZERS: dict[str, Contender] = {
    "AdamW": Contender((SILENCED,), "the default"),
    "Muon": Contender((SILENCED, MUON), "Muon moves the linears' matrices, AdamW the rest"),
    "Muon, memories too": Contender(
        (SILENCED, MUON, "train.muon_memories=true"), "and the memories' start weights", rate_of="Muon"
    ),
}
# Cells under this name are of starts that memories had, or that were tried by hand. They are kept, and not run again.
FORMER = "former: "
# Of the whole comparison; the numbers behind it are in the JSON.
OBSERVED = (
    "OmegaNet ends 0.04 bits per byte ahead of ATLAS with a write every 8 tokens, in every seed. Its short run at the "
    "same rate exploded in the first seed, with a gradient norm of 1e18; none of its whole runs did. At 0.003 it ended "
    "at 1.323, behind that ATLAS.",
    "Gated DeltaNet with the memories' starts is ahead of that ATLAS too, by 0.001 to 0.012. At 0.012 it is far worse. "
    "Attention, the sliding window and DeltaNet as drawn are far behind, from one seed.",
    "ATLAS at 0.012 is worse than at 0.006. After a quarter of the tokens fewer Newton-Schulz steps are better: three "
    "are ahead of five, with fewer FLOPs. More writes, of two steps each, are better still. No whole run has them yet.",
)


def contenders(names: Sequence[str]) -> dict[str, Contender]:
    """The contenders of these names, with patterns repeated to the base's length."""
    times = load(BASE).model.pattern.count("M-*-M-")

    def repeated(word: str) -> str:
        key, _, value = word.partition("=")
        return f"{key}={value * times}" if key == "model.pattern" else word

    def words_of(name: str) -> tuple[str, ...]:
        own = tuple(map(repeated, CONTENDERS[name].words))
        return (*own, SILENCED) if uses(load(BASE, own).model.pattern, "memory") else own

    return {n: replace(CONTENDERS[n], words=words_of(n)) for n in names}


def after_a_quarter(whole: Protocol) -> Protocol:
    """How optimizers are compared: at the rates from the second on, for those below are worse for both."""
    return replace(whole, steps=whole.steps // protocol.QUARTER, share=1, rates=whole.rates[1:])


def compare_optimizers(results: record.Record, whole: Protocol) -> None:
    """Train what is missing of OPTIMIZERS. AdamW's rates are those of the first contender."""
    comparison = after_a_quarter(whole)
    for rate in protocol.rates_of(results, STAGE, "atlas", whole):
        known = results.cells.get(protocol.rate_cell(STAGE, "atlas", rate))
        if known and rate >= comparison.rates[0]:
            results.cells.setdefault(protocol.rate_cell(OUTER, "AdamW", rate), known)
    protocol.compare(results, OUTER, comparison, OPTIMIZERS)


def optimizers(results: record.Record, whole: Protocol) -> list[str | record.Table]:
    """Tables of OPTIMIZERS, as of the contenders; none before one has a run."""
    comparison = after_a_quarter(whole)
    if not standings.ran(results, OUTER, tuple(OPTIMIZERS), comparison.seeds):
        return []
    said = f"ATLAS by outer optimizer, after {comparison.steps:,} steps. *Difference*: bits less those of AdamW:"
    return [said, *standings.tables(results, OUTER, OPTIMIZERS, comparison)]


def former(results: record.Record) -> list[str | record.Table]:
    """A table of the starts that were tried before those of today; none where there are none."""
    tried = {name.removeprefix(FORMER): cell for name, cell in results.cells.items() if name.startswith(FORMER)}
    rows = [
        (name, standings.said(cell), f"{cell['largest_gradient_norm']:.1f}" if "largest_gradient_norm" in cell else "")
        for name, cell in sorted(tried.items(), key=lambda item: ("quarter" in item[0], item[0]))
    ]
    if not rows:
        return []
    return [
        "Starts and rates that were tried before, from the first seed where no other is named, and of ATLAS where no "
        "other member is. *W2* is the length of its columns, *step* that of a write of 16 tokens. *A quarter* is one "
        "of the tokens, else all of them:",
        record.Table(("start", "bits per byte", "largest gradient norm"), rows),
    ]


def describe(
    results: record.Record, names: Sequence[str], comparison: Protocol, observed: Sequence[str] = ()
) -> None:
    """The page, from the numbers; observed: what was seen besides."""
    config = load(BASE)
    tokens = comparison.steps * config.train.global_batch * config.model.seq_length
    begun = standings.ran(results, STAGE, names, comparison.seeds)
    results.write_text(
        "Language modelling at equal parameters and tokens",
        f"Bits per byte of held-out text after {tokens:,} tokens in {comparison.steps:,} steps, from "
        f"{record.seeds_said(comparison.seeds)}. All models have {protocol.parameters(config):,} parameters, equal "
        "within 1 %. By the protocol each contender trains at every learning rate for a quarter of the tokens, and at "
        f"the best of them from every seed; the tables have what has run. *Difference*: the contender's bits less "
        f"those of {names[0]}, so less than zero is better. "
        "It counts where it has one sign in every seed."
        f"{standings.made(results, STAGE, names, comparison.seeds)}",
        [
            *standings.tables(results, STAGE, {name: CONTENDERS[name] for name in names}, comparison),
            *optimizers(results, comparison),
            *former(results),
        ],
        [
            standings.seen(results, STAGE, names, comparison.seeds),
            *([standings.seen(results, STAGE, names, comparison.seeds, EVERY_8)] if EVERY_8 in begun else []),
            standings.quarter(results, STAGE, names, comparison),
            *observed,
        ],
    )


def main(words: Sequence[str] | None = None) -> int:
    """Train what is missing, then draw and describe."""

    def experiment() -> None:
        asked = record.options("language_model", __doc__ or "", words, reports=True)
        names = QUICK if asked.quick else tuple(CONTENDERS)
        more = (*WORDS, "train.validate_sequences=4") if asked.quick else WORDS
        seeds, steps, rates = ((1,), 12, RATES[:2]) if asked.quick else (SEEDS, STEPS, RATES)
        comparison = Protocol(BASE, more, steps, rates, seeds, RUNS, further=0 if asked.quick else 2)
        settings = {"steps": steps, "rates": rates, "words": WORDS, "base": BASE.read_text(encoding="utf-8")}
        results = record.Record("language_model", asked, settings)
        if not asked.report:
            _check()
            protocol.compare(results, STAGE, comparison, contenders(names))
            compare_optimizers(results, comparison)
        standings.draw(results, STAGE, names, comparison)
        describe(results, names, comparison, () if asked.quick else OBSERVED)

    return record.run("language_model", experiment)


def _check() -> None:
    """Raise ValueError where the corpus or Muon's package is missing: each run would only say so."""
    from atlas_megatron.training import muon

    if not Path(f"{load(BASE).data.train[0]}.idx").is_file():
        raise ValueError(f"{load(BASE).data.train[0]}.idx is missing; run make quickstart once, which prepares it")
    wrong = muon.wrong_here(TrainConfig(optimizer="muon"), bf16=False)
    if wrong:
        raise ValueError(wrong)


if __name__ == "__main__":
    sys.exit(main())
