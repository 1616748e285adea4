"""What finished runs say of scale: loss against compute, curves through it, and kinds of model at equal compute.

Compute is the run's tokens times the project's own training FLOPs a token, which count what the memories spend on
learning at test time; 6 N D does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from atlas_megatron.checkpoint.checkpoint import CONFIG
from atlas_megatron.config import Config, layers_of, load_saved
from atlas_megatron.model.build import flops_per_token, num_params
from atlas_megatron.scaling.power_law import DRAWS, MIDDLE, Fit, fit, interval
from atlas_megatron.training.metrics import METRICS, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# In these, runs whose losses are compared must agree: the same text, cut into the same tokens and windows.
SAME = ("data.train", "data.validation", "data.tokenizer", "data.packed", "model.vocab_size", "model.seq_length",
        "train.validate_sequences")  # fmt: skip
AGAINST = {"compute": "training compute (FLOPs)", "parameters": "parameters, embeddings apart"}
METHOD = (
    "E + A x^-a is fitted by least squares of relative residuals over a grid of E. Error bars are the middle 80 % of "
    f"{DRAWS} refits to resampled residuals, widened by (n / (n - p))^0.5. They are too narrow for so few points: on "
    "synthetic curves with 4 to 8 points, they hold the true exponent in 61 to 71 %"
)


@dataclass(frozen=True)
class Run:
    """One point: a finished run."""

    directory: str
    kind: str  # what it is compared by
    parameters: int  # of the layers: without embeddings and output layer
    all_parameters: int
    tokens: int
    compute: float
    inner: float  # the share of compute that the memories' inner loop takes
    loss: float  # validation, nats a token, after the last step
    bits_per_byte: float | None

    def at(self, against: str) -> float:
        return float(getattr(self, against))


@dataclass(frozen=True)
class Kind:
    """The runs of one kind of model, by rising compute, and the curve through them, or why there is none."""

    name: str
    runs: tuple[Run, ...]
    curve: Fit | str


def read_runs(directories: Sequence[str | Path], compare: str = "") -> list[Run]:
    """The finished runs in these directories; `compare` names the config key that tells their kinds apart.

    Raises ValueError for a directory without a run, a run that has no validation loss or is not at its end, one that
    is given twice, runs of different data (naming the two and the key), and an unknown key.
    """
    configs = [_config(Path(directory)) for directory in directories]
    resolved = [str(Path(directory).resolve()) for directory in directories]
    for number, place in enumerate(resolved):
        if place in resolved[:number]:
            raise ValueError(f"{directories[number]} was given twice; give each run once")
    for directory, config in zip(directories[1:], configs[1:], strict=True):
        for key in SAME:
            first, other = _value(configs[0], key), _value(config, key)
            if first != other:
                raise ValueError(
                    f"{directories[0]} has {key}={first!r}, {directory} has {other!r}: their losses cannot be "
                    "compared; give runs of the same data and tokenizer"
                )
    return [_run(Path(d), config, compare) for d, config in zip(directories, configs, strict=True)]


def kinds_of(runs: Sequence[Run], against: str = "compute") -> list[Kind]:
    """The runs by kind, in the order in which the kinds came, with a curve through each."""
    kinds = []
    for name in dict.fromkeys(run.kind for run in runs):
        own = sorted((run for run in runs if run.kind == name), key=lambda run: run.at(against))
        curve = fit([run.at(against) for run in own], [run.loss for run in own])
        kinds.append(Kind(name, tuple(own), curve))
    return kinds


def _config(directory: Path) -> Config:
    if not (directory / CONFIG).is_file():
        raise ValueError(f"{directory / CONFIG} is missing; give the directory of a run that has trained")
    return load_saved(directory / CONFIG)


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    values = vars(vars(config)[section]) if section in vars(config) else {}
    if name not in values:
        raise ValueError(f"{key!r} is no key of a config; write one, for example memory.preset or model.pattern")
    return values[name]


def _kind(config: Config, key: str) -> str:
    if not key:
        return "all runs"
    value = _value(config, key)
    # Depth is the dial's: kinds of layers are what patterns differ in.
    return "".join(dict.fromkeys(layers_of(config))) if key == "model.pattern" else str(value) or "(none)"


def _run(directory: Path, config: Config, compare: str) -> Run:
    records = read(directory)
    validated = [record for record in records if record.get("validation_loss") is not None]
    if not validated:
        raise ValueError(
            f"{directory} has no validation loss in {METRICS}; train with train.validate_every above 0, or leave it out"
        )
    last = validated[-1]
    if records[-1]["step"] < config.train.steps or last["step"] < config.train.steps:
        raise ValueError(
            f"{directory} is validated at step {last['step']} of {config.train.steps}: its learning rate has not come "
            "down; train it to its end, or leave it out"
        )
    model, flops = config.model, flops_per_token(config)
    embeddings = (1 if model.tied_embeddings else 2) * model.vocab_size * model.hidden_size
    return Run(
        directory=str(directory),
        kind=_kind(config, compare),
        parameters=num_params(config) - embeddings,
        all_parameters=num_params(config),
        tokens=last["tokens"],
        compute=last["tokens"] * flops.training,
        inner=flops.inner / flops.training,
        loss=last["validation_loss"],
        bits_per_byte=last.get("validation_bits_per_byte"),
    )


@dataclass(frozen=True)
class Gap:
    """Two kinds at the largest compute (or size) that both have runs around."""

    first: str
    second: str
    at: float
    difference: float  # loss of the second, less that of the first
    interval: list[float]
    # The second's compute over what the first needs for the same loss; None where the first's curve does not get there.
    ratio: float | None


def gap(first: Kind, second: Kind, against: str = "compute") -> Gap | str:
    """The second kind against the first at equal compute, or one line on why they cannot be compared."""
    for kind in (first, second):
        if isinstance(kind.curve, str):
            return f"{second.name} against {first.name}: {kind.name} has {kind.curve}"
    assert isinstance(first.curve, Fit) and isinstance(second.curve, Fit)
    lowest = max(kind.runs[0].at(against) for kind in (first, second))
    highest = min(kind.runs[-1].at(against) for kind in (first, second))
    if lowest > highest:
        return f"{second.name} against {first.name}: they have no {against} in common; train both on the same ladder"
    losses = [float(kind.at(highest)) for kind in (first.curve, second.curve)]
    # Each was resampled with the same draws, in the same order: shuffled, they are independent.
    other = numpy.random.default_rng(1).permutation(second.curve.drawn_at(highest))
    needed = first.curve.where(losses[1])
    return Gap(
        first.name, second.name, highest, losses[1] - losses[0], interval(other - first.curve.drawn_at(highest)),
        highest / needed if needed else None,
    )  # fmt: skip


def content(kinds: Sequence[Kind], against: str) -> dict[str, Any]:
    """Runs, curves and gaps, for JSON."""
    return {
        "against": against,
        "method": METHOD,
        "kinds": {kind.name: {"runs": [vars(run) for run in kind.runs], "curve": _numbers(kind)} for kind in kinds},
        "gaps": [found if isinstance(found, str) else vars(found) for found in _gaps(kinds, against)],
    }


def _numbers(kind: Kind) -> dict[str, Any]:
    curve = kind.curve
    if isinstance(curve, str):
        return {"none": curve}
    numbers = {"E": "offset", "A": "factor", "a": "exponent"}
    found: dict[str, Any] = {name: getattr(curve, field) for name, field in numbers.items()}
    found |= {f"{name}_80_percent": curve.interval(field) for name, field in numbers.items()}
    return {**found, "notes": list(curve.notes)}


def _gaps(kinds: Sequence[Kind], against: str) -> list[Gap | str]:
    return [gap(kinds[0], other, against) for other in kinds[1:]]


def sentences(kinds: Sequence[Kind], against: str) -> list[str]:
    """What was found, a paragraph each: the curves, then the kinds beside the first."""
    symbol = {"compute": "C", "parameters": "N"}[against]
    said = [f"{kind.name}: {_curve_said(kind, symbol)}." for kind in kinds]
    for found in _gaps(kinds, against):
        if isinstance(found, str):
            said.append(f"{found}.")
            continue
        low, high = found.interval
        clear = "" if low > 0 or high < 0 else " (the error bar holds 0: no difference seen)"
        times = "" if found.ratio is None else f"{1 / found.ratio:.3g} times the {against}"
        by = f"; {found.first} has this loss at {times}" if times else ""
        said.append(
            f"{found.second} against {found.first} at {symbol} = {found.at:.3g}: {found.difference:+.4f} nats a token "
            f"({low:+.4f} to {high:+.4f}){clear}{by}."
        )
    return said


def _curve_said(kind: Kind, symbol: str) -> str:
    curve, count = kind.curve, len(kind.runs)
    if isinstance(curve, str):
        return curve
    bars = {name: "{:.3g} to {:.3g}".format(*curve.interval(name)) for name in ("offset", "exponent")}
    fixed = any("without it" in note for note in curve.notes)
    offset = "" if fixed else f"{curve.offset:.3f} + "
    with_bars = f"a = {bars['exponent']}" if fixed else f"E = {bars['offset']}, a = {bars['exponent']}"
    notes = "".join(f"; {note}" for note in curve.notes)
    return f"L = {offset}{curve.factor:.4g} {symbol}^-{curve.exponent:.3f} through {count} runs ({with_bars}){notes}"


def draw(axes: Axes, kinds: Sequence[Kind], against: str) -> None:
    """Points and curves, both axes logarithmic; a curve's band holds 80 % of the resampled ones."""
    for number, kind in enumerate(kinds):
        colour = f"C{number}"
        where = numpy.array([run.at(against) for run in kind.runs])
        axes.plot(where, [run.loss for run in kind.runs], "o", color=colour, markersize=5, label=kind.name)
        if isinstance(kind.curve, Fit):
            along = numpy.geomspace(where.min(), where.max(), 64)
            low, high = numpy.quantile(kind.curve.drawn_at(along), MIDDLE, axis=0)
            axes.plot(along, kind.curve.at(along), color=colour, linewidth=1)
            axes.fill_between(along, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.yaxis.set_minor_formatter("{x:.2f}")
    axes.set_xlabel(AGAINST[against])
    axes.set_ylabel("validation loss (nats a token)")
    axes.legend()
