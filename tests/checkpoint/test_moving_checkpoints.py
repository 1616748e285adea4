"""A checkpoint of any layout goes on in any other: model, optimizer, schedule and place in the data.

float32, without Newton-Schulz, which would blow up what sums round (test_layouts.py).
"""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import pytest

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.config import ParallelConfig
from atlas_megatron.training.metrics import read
from tests.support import tiny_run
from tests.support.layouts import LAYOUTS, Layout

SAVED, LAST = 2, 4  # steps
TOLERANCE = 1e-5
PATTERN = "M-*-M-"
CUTS = {1: (), 2: (3,), 4: (1, 3, 4)}


def layout(tensor: int, pipeline: int, context: int, data: int) -> Layout:
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, context=context)
    return Layout(tensor * pipeline * context * data, parallel, CUTS[pipeline])


# Pairs of these; the others go on from the last of them, and the first goes on from them.
MATRIX = {f"t{t} p{p} d{d}": layout(t, p, 1, d) for t, p, d in product((1, 2), repeat=3)}
OTHERS = {
    "t1 p1 c2 d1": layout(1, 1, 2, 1),
    "t2 p1 c2 d1": layout(2, 1, 2, 1),
    "t1 p2 c2 d1": layout(1, 2, 2, 1),
    "t1 p1 c2 d2": layout(1, 1, 2, 2),
    "t2 p2 c2 d1": layout(2, 2, 2, 1),
    "t2 p1 c2 d2": layout(2, 1, 2, 2),
    "t1 p2 c2 d2": layout(1, 2, 2, 2),
    "p4": layout(1, 4, 1, 1),
    "interleaved": LAYOUTS["interleaved"],
}
ALL = MATRIX | OTHERS
# From and to: a degree moves in four ways, and any two of the three in all sixteen. Each layout is left and entered.
MOVES = [(1, 1), (1, 2), (2, 1), (2, 2)]
MOVED = [tuple(zip(MOVES[t], MOVES[p], MOVES[t ^ p][::-1], strict=True)) for t, p in product(range(4), repeat=2)]
WITHIN = [tuple("t{} p{} d{}".format(*degrees) for degrees in pair) for pair in MOVED]
PAIRS = [*WITHIN, *product(["t2 p2 d2"], OTHERS), *product(OTHERS, ["t1 p1 d1"])]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read(folder)][SAVED:]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("moving"))


def words(name: str, folder: Path) -> list[str]:
    own = ["memory.preset=omeganet", "memory.heads=4", "attention.heads=4", f"train.steps={LAST}"]
    own += ["train.global_batch=2", "train.micro_batch=1", "train.validate_every=0", "train.stats_every=100"]
    own += ["data.validation=[]", f"checkpoint.every={SAVED}", f"run.directory={folder}"]
    return [*own, *ALL[name].words(PATTERN)]


def run_all(config: Path, runs: dict[Path, str]) -> None:
    """Train in each folder in the layout of that name, those of one size in the same processes."""
    for size in sorted({ALL[name].processes for name in runs.values()}):
        alike = [words(name, folder) for folder, name in runs.items() if ALL[name].processes == size]
        tiny_run.train_in(size, config, alike)


@pytest.fixture(scope="module")
def unmoved(config: Path) -> Path:
    """A folder with a run of each layout, by name, that never changed it."""
    folder = config.parent / "unmoved"
    run_all(config, {folder / name: name for name in ALL})
    return folder


@pytest.fixture(scope="module")
def moved(config: Path, unmoved: Path) -> Path:
    """A folder with a run for each pair of layouts, `<first> to <second>`, that changed from one to the other."""
    folder, runs = config.parent / "moved", {}
    for first, second in PAIRS:
        to = folder / f"{first} to {second}"
        shutil.copytree(unmoved / first, to)
        shutil.rmtree(checkpoint.folder_of(to) / f"step_{LAST:08d}")
        runs[to] = second
    run_all(config, runs)
    return folder


@pytest.mark.parallel
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda name: name)
def test_another_layout_takes_the_next_steps(moved: Path, unmoved: Path, first: str, second: str) -> None:
    ours, theirs = losses(moved / f"{first} to {second}"), losses(unmoved / first)
    assert len(ours) == LAST - SAVED
    assert ours == pytest.approx(theirs, rel=TOLERANCE)


def test_one_process_goes_on_where_two_pipeline_stages_stopped(config: Path) -> None:
    folder = config.parent / "short"
    tiny_run.train_in(2, config, [[*words("t1 p2 d1", folder), "checkpoint.async_save=true"]])
    theirs = losses(folder)
    shutil.rmtree(checkpoint.folder_of(folder) / f"step_{LAST:08d}")
    run_all(config, {folder: "t1 p1 d1"})
    assert losses(folder) == pytest.approx(theirs, rel=TOLERANCE)
