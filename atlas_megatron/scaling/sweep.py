"""One configuration at several learning rates and seeds, on one machine: the runs, how they are trained, what came out.

Each run is atlas-train in a process of its own, in a folder of its own below run.directory. Interrupted, it resumes; a
finished one is not trained again. A run that meets NaN is a result: that rate is too high.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from statistics import mean
from typing import TYPE_CHECKING

from atlas_megatron.checkpoint.checkpoint import CONFIG
from atlas_megatron.cli.ending import NON_FINITE
from atlas_megatron.config import Config, changed_toml, differences, load_saved
from atlas_megatron.config.checks import validate
from atlas_megatron.training.metrics import read
from atlas_megatron.training.readiness import wrong_with_data, wrong_with_directory

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    lr: float
    seed: int
    config: Config

    @property
    def directory(self) -> Path:
        return Path(self.config.run.directory)


@dataclass(frozen=True)
class Outcome:
    """What came out of a run. loss: of its last validation, nats a token; None where it met NaN or inf."""

    lr: float
    seed: int
    loss: float | None
    bits_per_byte: float | None = None


def points(config: Config, rates: Sequence[float], seeds: Sequence[int]) -> list[Point]:
    """The runs, by rising rate; min_lr keeps its share of lr. Raises ValueError where one could not train."""
    for lr in rates:
        if not math.isfinite(lr):
            raise ValueError(f"--lr {lr} is not finite; give a number")
    if not (config.data.validation and config.train.validate_every and config.train.validate_sequences):
        raise ValueError(
            "rates are compared by their validation loss, and there is none; set data.validation and "
            "train.validate_every"
        )
    if config.train.decay_from:
        raise ValueError(
            f"train.decay_from={config.train.decay_from!r} goes on at the rate of another run; leave it out of a sweep"
        )
    validate(config, 1)
    share, parent = config.train.min_lr / config.train.lr, Path(config.run.directory)
    found = []
    for lr in sorted(set(rates)):
        for seed in sorted(set(seeds)):
            run = replace(config.run, seed=seed, directory=str(parent / f"lr_{lr}_seed_{seed}"))
            train = replace(config.train, lr=lr, min_lr=share * lr)
            found.append(Point(lr, seed, replace(config, run=run, train=train)))
    for point in found:
        validate(point.config, 1)
    for line in (*wrong_with_data(config), *wrong_with_directory(config)):
        raise ValueError(line)
    for point in found:
        _check_what_is_there(point)
    return found


def _check_what_is_there(point: Point) -> None:
    file = point.directory / CONFIG
    if not file.is_file():
        return
    changed = differences(point.config, load_saved(file))
    if changed:
        raise ValueError(
            f"{point.directory} was trained with other keys: {', '.join(changed)}; set them as they were, or choose "
            "another run.directory"
        )


def outcome_of(point: Point) -> Outcome | None:
    """Of a run that is finished; None where it is not."""
    try:
        last = read(point.directory)[-1]
    except ValueError:
        # It has taken no step; where its records are broken, it says so itself when it resumes.
        return None
    if last["step"] < point.config.train.steps or "validation_loss" not in last:
        return None
    return Outcome(point.lr, point.seed, last["validation_loss"], last["validation_bits_per_byte"])


def train_all(runs: Sequence[Point], jobs: int, gpus: int, said: Callable[[Outcome], None]) -> list[Outcome]:
    """Train what is not finished, `jobs` runs at a time, and say each as it ends; outcomes in the order of `runs`.

    gpus: those of this machine, which jobs share in turn. Raises ValueError with a run's last line where it ends by
    anything but its end or NaN; the others are then asked to stop, and save.
    """
    running: list[subprocess.Popen[str]] = []
    places: SimpleQueue[int] = SimpleQueue()
    for place in range(jobs):
        places.put(place)
    found: dict[Point, Outcome] = {}

    def train(point: Point) -> tuple[Point, Outcome]:
        place = places.get()
        try:
            return point, outcome_of(point) or _trained(point, _environment(place, jobs, gpus), running)
        finally:
            places.put(place)

    with ThreadPoolExecutor(jobs) as workers:
        started = [workers.submit(train, point) for point in runs]
        try:
            for done in as_completed(started):
                point, outcome = done.result()
                found[point] = outcome
                said(outcome)
        except BaseException:
            for future in started:
                future.cancel()
            for process in running:
                process.terminate()
            raise
    return [found[point] for point in runs]


def _trained(point: Point, environment: dict[str, str], running: list[subprocess.Popen[str]]) -> Outcome:
    point.directory.mkdir(parents=True, exist_ok=True)
    file = point.directory / "sweep.toml"
    file.write_text(changed_toml(point.config), encoding="utf-8")
    words = [sys.executable, "-m", "atlas_megatron.train", str(file)]
    # What it shows lies in its log.txt too.
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    running.append(process)
    _, errors = process.communicate()
    running.remove(process)
    lines = errors.strip().splitlines() or [f"it ended with status {process.returncode} before its last step"]
    # Python's own status is 1 too, where it does not come as far as atlas-train.
    if process.returncode == NON_FINITE and lines[-1].startswith("atlas-train: "):
        return Outcome(point.lr, point.seed, None)
    finished = outcome_of(point) if process.returncode == 0 else None
    if finished is None:
        raise ValueError(f"{point.directory}: {lines[-1]}; the same command goes on")
    return finished


def _environment(place: int, jobs: int, gpus: int) -> dict[str, str]:
    """Of the run at this place among `jobs`: a GPU in turn, or its share of the cores."""
    own = {"CUDA_VISIBLE_DEVICES": _visible(gpus)[place % gpus]} if gpus else {}
    if jobs > 1 and not gpus:
        own["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    return {**os.environ, **own}


def _visible(gpus: int) -> list[str]:
    """The names of the GPUs that this process sees."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return given.split(",") if given else [str(number) for number in range(gpus)]


def means(outcomes: Sequence[Outcome]) -> dict[float, float | None]:
    """The mean loss of each rate over its seeds; None where one of them met NaN."""
    found: dict[float, float | None] = {}
    for lr in dict.fromkeys(outcome.lr for outcome in outcomes):
        losses = [outcome.loss for outcome in outcomes if outcome.lr == lr]
        reached = [loss for loss in losses if loss is not None]
        found[lr] = mean(reached) if len(reached) == len(losses) else None
    return found


def sentences(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """What was found: the best rate, whether it lies at an edge, and whether seeds differ more than rates."""
    found = {lr: loss for lr, loss in means(outcomes).items() if loss is not None}
    if not found:
        yield "every rate met NaN or inf with some seed; try lower ones"
        return
    best, *others = sorted(found, key=lambda lr: found[lr])
    yield f"the best rate is {best:g}: validation loss {found[best]:.4f}"
    rates = list(means(outcomes))
    for edge, word, factor in ((rates[0], "lowest", 0.5), (rates[-1], "highest", 2.0)):
        if best == edge and len(rates) > 1:
            yield f"it is the {word} that was tried; try {best * factor:g} too"
    spread = [outcome.loss for outcome in outcomes if outcome.lr == best and outcome.loss is not None]
    if len(spread) > 1 and others and max(spread) - min(spread) > found[others[0]] - found[best]:
        yield f"its seeds lie {max(spread) - min(spread):.4f} apart, more than {others[0]:g} is behind: no clear best"


def draw(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Loss against the rate: every seed a dot, the mean a line, a cross above where a run met NaN."""
    reached = [(outcome.lr, outcome.loss) for outcome in outcomes if outcome.loss is not None]
    axes.plot([lr for lr, _ in reached], [loss for _, loss in reached], "o", color="C0", alpha=0.6, label="each seed")
    line = [(lr, loss) for lr, loss in means(outcomes).items() if loss is not None]
    axes.plot([lr for lr, _ in line], [loss for _, loss in line], color="C0", linewidth=1, label="mean of seeds")
    lost = sorted({outcome.lr for outcome in outcomes if outcome.loss is None})
    top = max((loss for _, loss in reached), default=1.0)
    if lost:
        axes.plot(lost, [top] * len(lost), "x", color="C3", label="met NaN or inf")
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation loss (nats a token)")
    axes.legend()
