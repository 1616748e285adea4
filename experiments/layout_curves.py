"""One run that goes on in several parallel layouts: its loss curves, laid over each other.

configs/quickstart.toml trains its first steps on one process. From that checkpoint the same run goes on in each
layout, on two processes and on eight. torchrun starts them, as a user would. Run `make quickstart` first, for its
corpus.

In float32 the layouts sum in different orders, and training amplifies the difference (tests/parallel/test_layouts.py).
The curves show how fast.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib import pyplot

from atlas_megatron.config import load
from atlas_megatron.training.metrics import read
from experiments.shared import record

BASE = record.ROOT / "configs" / "quickstart.toml"
RUNS = record.ROOT / "runs" / "experiments" / "layout_curves"
PRESETS = ("atlas", "omeganet")
ONE = "one process"
# Processes, and what is changed.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    ONE: (1, ()),
    "data 2": (2, ()),
    "tensor 2, sequence parallel": (2, ("parallel.tensor=2", "parallel.sequence=true")),
    "pipeline 2, interleaved": (2, ("parallel.pipeline=2", "parallel.virtual=2", "model.pattern=M-|*-|M|-")),
    "context 2, heads": (2, ("parallel.context=2", "parallel.context_mode=heads")),
    "context 2, handoff": (2, ("parallel.context=2", "parallel.context_mode=handoff")),
    "tensor 2 x pipeline 2 x context 2": (
        8,
        ("parallel.tensor=2", "parallel.pipeline=2", "parallel.context=2", "model.pattern=M-*|-M-"),
    ),
}
# Steps on one process alone, and those that are compared.
START, STEPS = 20, 40
QUICK_START, QUICK_STEPS = 1, 2
QUICK = (ONE, "context 2, handoff")


def trained(layout: str, preset: str, start: int, steps: int) -> record.Cell:
    """Loss and gradient norm of every step after `start`; up to there the run trained on one process."""
    processes, changes = LAYOUTS[layout]
    directory = RUNS / f"{layout} {preset}".replace(",", "").replace(" ", "_")
    shutil.rmtree(directory, ignore_errors=True)
    if layout != ONE:
        taken_up = _checkpoint(preset, start, steps)
        shutil.copytree(taken_up, directory / "checkpoints" / taken_up.name)
    words = [f"run.directory={directory}", f"memory.preset={preset}", f"train.steps={start + steps}"]
    words += ["train.lr=1e-3", f"train.warmup_steps={start // 2}", "train.validate_every=0", "train.global_batch=4"]
    words += ["train.micro_batch=1", f"checkpoint.every={start}", "checkpoint.keep=1000", "log.tensorboard=false"]
    words += ["train.stats_every=1000000", *changes]
    if preset == "atlas":
        words += [f"memory.ns_period={load(BASE).memory.ns_period}"]  # which the preset would set
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*launch, "-m", "atlas_megatron.train", str(BASE), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=record.ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"{layout}, {preset} did not train to its end: {done.stderr.strip().splitlines()[-1]}")
    steps_done = [step for step in read(directory) if step["step"] > start]
    if layout != ONE:
        shutil.rmtree(directory / "checkpoints")
    return {
        "changes": list(changes),
        "processes": processes,
        "loss": [step["loss"] for step in steps_done],
        "grad_norm": [step["grad_norm"] for step in steps_done],
    }


def _checkpoint(preset: str, start: int, steps: int) -> Path:
    """The checkpoint of one process after `start` steps; its run is trained again if the checkpoint is gone."""
    folders = RUNS / f"{ONE} {preset}".replace(" ", "_") / "checkpoints"
    if not folders.is_dir():
        trained(ONE, preset, start, steps)
    return min(folders.glob("step_*"))


def apart(results: record.Record, layout: str, preset: str) -> list[float]:
    """Each step's relative distance of the loss from that of one process."""
    ours, theirs = (results.cells[f"{name}, {preset}"]["loss"] for name in (layout, ONE))
    return [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]


def draw(results: record.Record, layouts: Sequence[str]) -> None:
    with pyplot.style.context(record.STYLE):
        figure, panels = pyplot.subplots(2, len(PRESETS), figsize=(11, 6), sharex=True, layout="constrained")
        for (above, below), preset in zip(panels.T, PRESETS, strict=True):
            for place, layout in enumerate(layouts):
                losses = results.cells[f"{layout}, {preset}"]["loss"]
                # Thick below thin, so that curves in one place all show.
                above.plot(losses, label=layout, color=f"C{place}", linewidth=1 + 1.5 * (len(layouts) - place) / 2)
                if layout != ONE:
                    differences = [max(value, 1e-9) for value in apart(results, layout, preset)]
                    below.plot(differences, color=f"C{place}", linewidth=1)
            below.set_yscale("log")
            below.set_xlabel("step after the checkpoint")
            above.set_title(preset)
        panels[0][0].set_ylabel("training loss")
        panels[1][0].set_ylabel("relative distance\nfrom one process")
        panels[0][-1].legend(fontsize="x-small")
        results.save_figure(figure)


# Of the full run.
OBSERVED = (
    """In float32 the first losses after the checkpoint are those of one process to 1e-7 in every layout. Then each step
    feeds back what the step before it rounded. That goes at about the same rate in all layouts. Data parallelism is no
    exception, though it changes no product but an order of sums. After some ten steps the distance levels off.
    Newton-Schulz alone is not the reason: OmegaNet has none, and parts further than ATLAS.""",
)


def describe(
    results: record.Record, layouts: Sequence[str], start: int, steps: int, observed: Sequence[str]
) -> None:
    """The page: how far each layout's losses come from those of one process."""
    rows = []
    for layout in layouts:
        if layout != ONE:
            worst = (f"{max(apart(results, layout, preset)):.1e}" for preset in PRESETS)
            rows.append((layout, str(LAYOUTS[layout][0]), *worst))
    results.write_text(
        "One run in several layouts",
        f"The quickstart's model is trained for {start} steps on one process. From that checkpoint each layout trains "
        f"{steps} more steps, in float32, from one seed. The table has the largest relative distance of a step's loss "
        "from the loss of one process.",
        [record.Table(("layout", "processes", *PRESETS), rows)],
        observed,
    )


def main(words: Sequence[str] | None = None) -> int:
    asked = record.options("layout_curves", __doc__, words)
    layouts = QUICK if asked.quick else tuple(LAYOUTS)
    start, steps = (QUICK_START, QUICK_STEPS) if asked.quick else (START, STEPS)

    def experiment() -> None:
        chosen = {name: LAYOUTS[name] for name in layouts}
        results = record.Record("layout_curves", asked, {"start": start, "steps": steps, "layouts": chosen})
        if not Path(f"{load(BASE).data.train[0]}.bin").is_file():
            raise ValueError(f"{load(BASE).data.train[0]} holds no corpus; run make quickstart first")
        for preset in PRESETS:
            for layout in layouts:
                results.cell(f"{layout}, {preset}", partial(trained, layout, preset, start, steps))
        draw(results, layouts)
        describe(results, layouts, start, steps, () if asked.quick else OBSERVED)

    return record.run("layout_curves", experiment)


if __name__ == "__main__":
    sys.exit(main())
