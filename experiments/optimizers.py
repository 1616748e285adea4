"""The outer optimizer: AdamW against Megatron-Core's Muon, at equal tokens, each at its best rate, from three seeds.

The model is the quickstart's. `atlas-train` trains it on the quickstart's corpus: run `make quickstart` first, or
tools/prepare_data.py, and `pip install emerging-optimizers==0.3.0`. Each optimizer trains at three learning rates for a
quarter of the tokens, then at the best of them from three seeds. Reported: bits per byte of the held-out text after the
last step, and whether a difference has one sign in every seed.

On two cores, two runs side by side, the whole of it takes about five hours (an estimate). A cell is kept as it ends;
interrupt it and call it again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from atlas_megatron.config import TrainConfig, load
from experiments.shared import protocol, record, standings
from experiments.shared.protocol import Contender, Protocol

BASE = record.ROOT / "configs" / "experiments" / "language_model.toml"
RUNS = record.ROOT / "runs" / "experiments" / "optimizers"
STAGE = "optimizers"
SEEDS = (1, 2, 3)
STEPS = 1000
# With train.muon_extra_scale_factor = 0.2 an update of Muon is as large as one of AdamW: the same rates suit both.
RATES = (1.5e-3, 3e-3, 6e-3)
WORDS = ("train.validate_sequences=176", "train.stats_every=1000000", "log.tensorboard=false")
MUON = "train.optimizer=muon"
CONTENDERS: dict[str, Contender] = {
    "AdamW": Contender(asks="moves everything"),
    "Muon": Contender((MUON,), "moves the linears' matrices, AdamW the rest"),
    "Muon, memories too": Contender((MUON, "train.muon_memories=true"), "and start weights", rate_of="Muon"),
}
QUICK = ("AdamW", "Muon")


def describe(results: record.Record, names: Sequence[str], comparison: Protocol) -> None:
    """The page, from the numbers."""
    config = load(BASE)
    tokens = comparison.steps * config.train.global_batch * config.model.seq_length
    results.write_text(
        "The outer optimizer",
        f"Bits per byte of held-out text after {tokens:,} tokens in {comparison.steps:,} steps, from "
        f"{record.seeds_said(comparison.seeds)}. The model has {protocol.parameters(config):,} parameters. Each "
        "optimizer trains at every learning rate for a quarter of the tokens, and at the best of them from every seed. "
        f"*Difference*: its bits less those of {names[0]}, so less than zero is better. It counts where it has one "
        f"sign in every seed.{standings.made(results, STAGE, names, comparison.seeds)}",
        standings.tables(results, STAGE, {name: CONTENDERS[name] for name in names}, comparison),
        [standings.seen(results, STAGE, names, comparison.seeds)],
    )


def main(words: Sequence[str] | None = None) -> int:
    """Train what is missing, then draw and describe."""

    def experiment() -> None:
        asked = record.options("optimizers", __doc__ or "", words, reports=True)
        names = QUICK if asked.quick else tuple(CONTENDERS)
        more = (*WORDS, "train.validate_sequences=4") if asked.quick else WORDS
        seeds, steps, rates = ((1,), 12, RATES[:2]) if asked.quick else (SEEDS, STEPS, RATES)
        comparison = Protocol(BASE, more, steps, rates, seeds, RUNS, further=0 if asked.quick else 2)
        settings = {"steps": steps, "rates": rates, "words": WORDS, "base": BASE.read_text(encoding="utf-8")}
        results = record.Record("optimizers", asked, settings)
        if not asked.report:
            _check()
            protocol.compare(results, STAGE, comparison, {name: CONTENDERS[name] for name in names})
        standings.draw(results, STAGE, names, comparison)
        describe(results, names, comparison)

    return record.run("optimizers", experiment)


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
