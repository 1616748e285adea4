"""How language models are compared: equal parameters and tokens, each at its best rate, one sign in every seed.

A contender is a base configuration with a few words changed. Its MLPs are as wide as makes its parameters the first
contender's. First it trains once at every rate, for a share of the tokens, from the first seed. Where the lowest or
the highest rate is the best, it is halved or doubled until it is not. Then it trains at the best rate from every seed.
A run that meets NaN, or that the configuration refuses, is a cell that says so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median

from atlas_megatron.config import Config, load
from atlas_megatron.training.metrics import METRICS, read
from atlas_megatron.training.validation import POSITION_LOSS
from experiments.shared import record, trials

QUARTER = 4  # of the tokens, where rates are compared
BIN = 16  # positions of the context whose loss a cell keeps as one mean


@dataclass(frozen=True)
class Contender:
    """What is compared. words: changes of the base. asks: what its row is there to show. trial: a name of `trials`.
    rate_of: the contender whose best rate it takes, where it searches none of its own."""

    words: tuple[str, ...] = ()
    asks: str = ""
    trial: str = ""
    rate_of: str = ""


@dataclass(frozen=True)
class Protocol:
    """How runs train. base: a TOML file; words: of every run; steps: of a whole run; rates: empty for the base's.
    further: how many rates a search adds, at most, past an edge that is the best. share: rates are compared after so
    many times fewer steps; with 1 a run that compared rates is the one of its seed."""

    base: Path
    words: tuple[str, ...]
    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    runs: Path  # where runs lie while they train
    further: int = 0
    share: int = QUARTER

    def words_of(self, contender: Contender, first: Contender, steps: int, seed: int, rate: float | None) -> list[str]:
        """All words of a run of the contender, with MLPs that make it equal to `first` in parameters."""
        own = [*self.words, *contender.words]
        wanted = parameters(load(self.base, [*self.words, *first.words]))
        length = [f"train.steps={steps}", f"train.warmup_steps={steps // 10}", f"train.validate_every={steps}"]
        length += [f"checkpoint.every={max(1, steps // 4)}", f"run.seed={seed}"]
        chosen = [] if rate is None else [f"train.lr={rate}", f"train.min_lr={rate / 10}"]
        return [*own, *length, *chosen, f"model.ffn_hidden_size={_width(self.base, own, wanted)}"]

    def job(
        self, name: str, contenders: dict[str, Contender], seed: int, steps: int, rate: float | None
    ) -> partial[record.Cell]:
        """What trains one run; a partial that another process can call."""
        first, contender = next(iter(contenders.values())), contenders[name]
        words = self.words_of(contender, first, steps, seed, rate)
        plain = "".join(letter if letter.isalnum() else "_" for letter in name)
        directory = self.runs / f"{plain}_{seed}_{steps}{'' if rate is None else f'_{rate}'}"
        return partial(trained, self.base, words, directory, contender.trial)


def parameters(config: Config) -> int:
    from atlas_megatron.model.build import num_params

    return num_params(config)


def _width(base: Path, words: Sequence[str], wanted: int) -> int:
    """The width of the MLPs with which the model has about `wanted` parameters."""
    config = load(base, words)
    one, two = (parameters(replace(config, model=replace(config.model, ffn_hidden_size=w))) for w in (8, 16))
    return max(8, round(8 + (wanted - one) / ((two - one) / 8)))


def trained(base: Path, words: list[str], directory: Path, trial: str = "", keep: bool = False) -> record.Cell:
    """Train one run, in a process of its own. Gives what it reached, or what went wrong. keep: its folder too.

    Raises ValueError where the run was asked to stop. Its folder stays, and the next call goes on from its checkpoint.
    """
    if trial:
        trials.install(trial)
    status = record.train_quietly([str(base), *words, f"run.directory={directory}"], directory)
    metrics = directory / METRICS  # empty where the first step failed
    records = read(directory) if metrics.is_file() and metrics.stat().st_size else []
    config = load(base, words)
    found: record.Cell = {"bits_per_byte": None, "parameters": parameters(config), "words": words, "trial": trial}
    if records:
        found["largest_gradient_norm"] = round(max(r["grad_norm"] for r in records), 3)
    if status:
        said = (directory / "log.txt").read_text(encoding="utf-8").strip().splitlines()
        return found | {"wrong": f"status {status}: {said[-1] if said else 'no word'}"}
    last = records[-1]
    if "validation_bits_per_byte" not in last:
        raise ValueError(f"the run in {directory} was stopped at step {last['step']}; the same command goes on with it")
    if "validation_loss_silenced" in last:
        found["loss_silenced"] = last["validation_loss_silenced"]
    if (directory / POSITION_LOSS).is_file():
        loss = json.loads((directory / POSITION_LOSS).read_text(encoding="utf-8"))["loss"]
        found["loss_by_position"] = [round(mean(loss[at : at + BIN]), 4) for at in range(0, len(loss), BIN)]
    if not keep:  # the cell is the result; a run that is asked for again begins again
        shutil.rmtree(directory)
    return found | {
        "bits_per_byte": last["validation_bits_per_byte"],
        "loss": last["validation_loss"],
        "tokens": last["tokens"],
        "tokens_per_second": round(median(r["tokens_per_second"] for r in records)),
    }


def compare(results: record.Record, stage: str, protocol: Protocol, contenders: dict[str, Contender]) -> None:
    """Train every cell that is missing: first the rates of all, then seed by seed.

    So an interrupted run has compared all contenders as far as it came.
    """
    job = partial(protocol.job, contenders=contenders)
    names = list(contenders)
    short, searching = protocol.steps // protocol.share, [n for n in names if not contenders[n].rate_of]
    for _ in range(1 + protocol.further):  # each turn may add a rate
        tried = {n: rates_of(results, stage, n, protocol) for n in searching}
        record.side_by_side(
            results,
            {
                rate_cell(stage, n, rate): job(n, seed=protocol.seeds[0], steps=short, rate=rate)
                for n in searching
                for rate in tried[n]
            },
        )
    for seed in protocol.seeds:
        jobs = {}
        for name in names:
            rate = best_rate(results, stage, contenders[name].rate_of or name, protocol)
            compared = "" if rate is None else rate_cell(stage, name, rate)
            if protocol.share == 1 and seed == protocol.seeds[0] and compared in results.cells:
                results.cells[seed_cell(stage, name, seed)] = results.cells[compared]
            elif rate is not None or not protocol.rates:
                jobs[seed_cell(stage, name, seed)] = job(name, seed=seed, steps=protocol.steps, rate=rate)
        record.side_by_side(results, jobs)


def rate_cell(stage: str, name: str, rate: float) -> str:
    return f"{stage}: {name}, lr {rate:g}"


def seed_cell(stage: str, name: str, seed: int) -> str:
    return f"{stage}: {name}, seed {seed}"


def rates_of(results: record.Record, stage: str, name: str, protocol: Protocol) -> list[float]:
    """The rates at which a contender is tried, ascending: the protocol's, and those past an edge that is the best."""
    rates = sorted(protocol.rates)
    for _ in range(protocol.further if rates else 0):
        if any(rate_cell(stage, name, rate) not in results.cells for rate in rates):
            break
        best = _best(results, stage, name, rates)
        if best == rates[-1]:
            rates.append(2 * rates[-1])
        elif best == rates[0]:
            rates.insert(0, rates[0] / 2)
        else:
            break
    return rates


def best_rate(results: record.Record, stage: str, name: str, protocol: Protocol) -> float | None:
    """The rate with the fewest bits per byte after a quarter of the tokens; None if no run trained to its end."""
    return _best(results, stage, name, rates_of(results, stage, name, protocol))


def _best(results: record.Record, stage: str, name: str, rates: Sequence[float]) -> float | None:
    cells = {rate: results.cells.get(rate_cell(stage, name, rate), {}) for rate in rates}
    reached = {rate: cell["bits_per_byte"] for rate, cell in cells.items() if cell.get("bits_per_byte") is not None}
    return min(reached, key=lambda rate: reached[rate]) if reached else None


def reached(results: record.Record, stage: str, name: str, seeds: Sequence[int]) -> list[float | None]:
    """Bits per byte of each seed; None where a run is missing or did not train to its end."""
    return [results.cells.get(seed_cell(stage, name, seed), {}).get("bits_per_byte") for seed in seeds]


def apart(ours: Sequence[float | None], theirs: Sequence[float | None]) -> tuple[float, str] | None:
    """The mean of theirs - ours over the seeds that both have, and whether every one has its sign."""
    pairs = [b - a for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    if len(pairs) == 1:
        return pairs[0], "one seed"
    one_sign = all(d > 0 for d in pairs) or all(d < 0 for d in pairs)
    return mean(pairs), "every seed" if one_sign else "seeds disagree"
