"""Every layout trains as one process does.

Ten steps in float32, as a user runs them: loss and gradient norm to 1e-4. One step's gradients: every parameter to
1e-4 relative RMS. Both without Newton-Schulz; with it (ATLAS, five steps), in float64. Five steps multiply what is
small in a momentum by up to 3.4^5 = 485, rounding included, so that in float32 a gradient is good to about 1e-4 of
itself and training is chaotic: `test_newton_schulz_rounds_no_worse_spread_than_disturbed` shows that a layout moves
float32 gradients no further than one rounding of the start does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import pytest
import torch

from atlas_megatron.training.metrics import read
from tests.support import tiny_run
from tests.support.layouts import BASES, LAYOUTS, ONE, fits, gathered, save_start, step_by_step
from tests.support.processes import run

TOLERANCE = 1e-4
EXACT = 1e-6  # of float64; core sums gradient norms in float32
STEPS = 10
SHORT = ("memory", "tensor")  # the layout that `make test` tries
# Muon's own Newton-Schulz sees gradients of which the layouts agree to rounding. Each way to share is there once.
OF_MUON = ("data", "tensor", "sequence", "interleaved", "context handoff", "tensor x pipeline x context")
CASES = [(base, layout) for base in ("memory", "hybrid") for layout in LAYOUTS if fits(base, layout)]
CASES += [("muon", layout) for layout in OF_MUON if find_spec("emerging_optimizers")]
MARKED = [case if case == SHORT else pytest.param(*case, marks=pytest.mark.parallel) for case in CASES]
WORDS = {
    "memory": ["memory.preset=omeganet", "model.pattern=M-*-M-"],
    "muon": ["memory.preset=omeganet", "model.pattern=M-*-M-", "train.optimizer=muon", "train.muon_memories=true"],
    "hybrid": ["memory.preset=dot", "model.pattern=A-C-F-", "attention.persistent=2", "attention.segment=8"],
}


def relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs)


def rms(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to theirs; of tensors that are zero, zero."""
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-300)).item()


def assert_same(
    ours: Iterable[tuple[float, float]], theirs: Iterable[tuple[float, float]], tolerance: float = TOLERANCE
) -> None:
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        for name, a, b in zip(("loss", "gradient norm"), mine, other, strict=True):
            assert relative(a, b) < tolerance, f"step {step}: {name} {a} is not {b}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[tuple[float, float]]]:
    """Trains ten steps as a user does: (base, layout) -> [(loss, gradient norm)]."""
    root = tmp_path_factory.mktemp("trained")
    config = tiny_run.write(root)
    done: dict[tuple[str, str], list[tuple[float, float]]] = {}

    def train(base: str, name: str) -> list[tuple[float, float]]:
        if (base, name) in done:
            return done[base, name]
        folder = root / f"{base} {name}"
        words = [*WORDS[base], "train.micro_batch=1", "train.validate_every=0", "memory.heads=4"]
        words += ["attention.heads=4", "model.tied_embeddings=" + str(base != "hybrid").lower()]
        layout = ONE if name == "one" else LAYOUTS[name]
        pattern = WORDS[base][1].partition("=")[2]
        words += [*layout.words(pattern), f"run.directory={folder}", f"train.steps={STEPS}"]
        tiny_run.train_in(layout.processes, config, [words])
        done[base, name] = [(record["loss"], record["grad_norm"]) for record in read(folder)]
        return done[base, name]

    return train


@pytest.mark.parametrize(("base", "layout"), MARKED)
def test_ten_steps(trained: Callable[[str, str], list[tuple[float, float]]], base: str, layout: str) -> None:
    ours, theirs = trained(base, layout), trained(base, "one")
    assert len(ours) == STEPS
    assert_same(ours, theirs)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint `<base> start` of each base."""
    folder = tmp_path_factory.mktemp("starts")
    run(1, save_start, BASES, folder)
    return folder


def gradients(
    folder: Path, base: str, names: list[str], dtype: torch.dtype, steps: int = 1, disturbed: int = 0
) -> tuple[list[dict[str, torch.Tensor]], list[list[tuple[float, float]]]]:
    """Of each layout of these names, "one" among them: the first step's gradients, whole, and all steps' losses."""
    config, chosen = BASES[base], {"one": ONE, **LAYOUTS}
    paths = [folder / f"{base} {name} {dtype} {disturbed}" for name in names]
    cases = [(chosen[n].of(config), folder / f"{base} start", path) for n, path in zip(names, paths, strict=True)]
    steps_of: list[list[tuple[float, float]]] = []
    # Neighbours of one size share their processes.
    for size, alike in groupby(zip(names, cases, strict=True), key=lambda case: chosen[case[0]].processes):
        steps_of += run(size, step_by_step, [case for _, case in alike], dtype, steps, disturbed)[0]
    return run(1, gathered, ONE.of(config), paths, dtype)[0], steps_of


@pytest.mark.parametrize("base", ["memory", pytest.param("hybrid", marks=pytest.mark.parallel)])
def test_gradients_of_one_step(starts: Path, base: str) -> None:
    names = ["one", *(name for name in LAYOUTS if fits(base, name))]
    (one, *others), _ = gradients(starts, base, names, torch.float32)
    assert all(value.abs().max() > 0 for value in one.values())
    for name, found in zip(names[1:], others, strict=True):
        for parameter, value in found.items():
            assert rms(value, one[parameter]) < TOLERANCE, f"{name}: {parameter}"


@pytest.mark.parallel
def test_atlas_in_float64(starts: Path) -> None:
    names = ["one", *LAYOUTS]
    (one, *others), (alone, *steps) = gradients(starts, "atlas", names, torch.float64, STEPS)
    for name, found, taken in zip(names[1:], others, steps, strict=True):
        assert_same(taken, alone, EXACT)
        for parameter, value in found.items():
            assert rms(value, one[parameter]) < EXACT, f"{name}: {parameter}"


def test_local_memories_in_float64(starts: Path) -> None:
    """Heads over ranks bring their local memories along, from a checkpoint of one process."""
    names = ["one", "tensor", "sequence x context"]
    (one, *others), (alone, *steps) = gradients(starts, "hierarchy", names, torch.float64, 2)
    assert all(one[name].abs().max() > 0 for name in one)
    assert any("local_first" in name for name in one)
    for name, found, taken in zip(names[1:], others, steps, strict=True):
        assert_same(taken, alone, EXACT)
        for parameter, value in found.items():
            assert rms(value, one[parameter]) < EXACT, f"{name}: {parameter}"


@pytest.mark.parallel
def test_newton_schulz_rounds_no_worse_spread_than_disturbed(starts: Path) -> None:
    names = ["one", "tensor", "pipeline", "data"]
    (one, *others), _ = gradients(starts, "atlas", names, torch.float32)
    reruns = [gradients(starts, "atlas", ["one"], torch.float32, disturbed=seed)[0][0] for seed in (1, 2, 3)]
    noise = max(rms(rerun[parameter], value) for rerun in reruns for parameter, value in one.items())
    assert 0 < noise < TOLERANCE  # without an output norm Newton-Schulz blows little up
    for name, found in zip(names[1:], others, strict=True):
        worst = max(rms(value, one[parameter]) for parameter, value in found.items())
        assert worst < 3 * noise, f"{name}: {worst:.1e}, disturbed {noise:.1e}"
