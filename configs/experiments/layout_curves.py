"""The same run in several parallel layouts: its loss curves, laid over each other.

configs/quickstart.toml for a few steps, on one process and on two and eight, each started by torchrun as a user would,
on the quickstart's corpus (run `make quickstart` first). In float32 five Newton-Schulz steps blow rounding up (see
tests/parallel/test_layouts.py), so the curves of ATLAS part in their last digits; those of omeganet, which has none,
are held to 1e-4 by that test. Both are shown.
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

import record
from atlas_megatron.config import load
from atlas_megatron.metrics import read

BASE = record.ROOT / "configs" / "quickstart.toml"
RUNS = record.ROOT / "runs" / "experiments" / "layout_curves"
PRESETS = ("atlas", "omeganet")
# Processes, and what is changed.
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
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
STEPS, QUICK_STEPS = 40, 2
QUICK = ("one process", "context 2, handoff")


def trained(layout: str, preset: str, steps: int) -> record.Cell:
    """The loss and the gradient norm of every step."""
    processes, changes = LAYOUTS[layout]
    directory = RUNS / f"{layout} {preset}".replace(",", "").replace(" ", "_")
    shutil.rmtree(directory, ignore_errors=True)
    words = [f"run.directory={directory}", f"memory.preset={preset}", f"train.steps={steps}", "train.warmup_steps=1"]
    words += ["train.validate_every=0", f"checkpoint.every={steps}", "log.tensorboard=false", "train.micro_batch=1"]
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
    steps_done = read(directory)
    shutil.rmtree(directory / "checkpoints")
    return {
        "changes": list(changes),
        "processes": processes,
        "loss": [step["loss"] for step in steps_done],
        "grad_norm": [step["grad_norm"] for step in steps_done],
    }


def apart(results: record.Record, layout: str, preset: str) -> list[float]:
    """Of each step, how far the loss is from one process's, relative."""
    ours, theirs = (results.cells[f"{name}, {preset}"]["loss"] for name in (layout, "one process"))
    return [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]


def draw(results: record.Record, layouts: Sequence[str]) -> None:
    with pyplot.style.context(record.STYLE):
        figure, panels = pyplot.subplots(2, len(PRESETS), figsize=(11, 6), sharex=True, layout="constrained")
        for (above, below), preset in zip(panels.T, PRESETS, strict=True):
            for place, layout in enumerate(layouts):
                losses = results.cells[f"{layout}, {preset}"]["loss"]
                # Thick below thin, so that curves in one place all show.
                above.plot(losses, label=layout, color=f"C{place}", linewidth=1 + 1.5 * (len(layouts) - place) / 2)
                if layout != "one process":
                    differences = [max(value, 1e-9) for value in apart(results, layout, preset)]
                    below.plot(differences, color=f"C{place}", linewidth=1)
            below.set_yscale("log")
            below.set_xlabel("step")
            above.set_title(preset)
        panels[0][0].set_ylabel("training loss")
        panels[1][0].set_ylabel("relative distance\nfrom one process")
        panels[0][-1].legend(fontsize="x-small")
        results.save_figure(figure)


def describe(results: record.Record, layouts: Sequence[str], steps: int) -> None:
    said = []
    for preset in PRESETS:
        worst = [f"{layout} {max(apart(results, layout, preset)):.1e}" for layout in layouts if layout != "one process"]
        said.append(f"Farthest from the one process's loss in {steps} steps, {preset}: {'; '.join(worst)}.")
    said.append(
        "float32; the layouts sum in other orders. Newton-Schulz multiplies what is small in a momentum, rounding "
        "included, by up to 485, so that ATLAS in float32 parts from itself under any change of layout."
    )
    results.write_text("One run in several layouts", said)


def main(words: Sequence[str] | None = None) -> int:
    asked = record.options("layout_curves", __doc__, words)
    layouts, steps = (QUICK, QUICK_STEPS) if asked.quick else (tuple(LAYOUTS), STEPS)

    def experiment() -> None:
        chosen = {name: LAYOUTS[name] for name in layouts}
        results = record.Record("layout_curves", asked, {"steps": steps, "layouts": chosen})
        if not Path(f"{load(BASE).data.train[0]}.bin").is_file():
            raise ValueError(f"{load(BASE).data.train[0]} holds no corpus; run make quickstart first")
        for preset in PRESETS:
            for layout in layouts:
                results.cell(f"{layout}, {preset}", partial(trained, layout, preset, steps))
        draw(results, layouts)
        describe(results, layouts, steps)

    return record.run("layout_curves", experiment)


if __name__ == "__main__":
    sys.exit(main())
