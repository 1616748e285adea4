"""Two processes, with ZeRO and without, train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_megatron.finetune.plan import REPORT
from tests.finetune.test_finetuning import ROOT, losses, weights
from tests.support import exported_models as exported

pytest.importorskip("deepspeed", reason="ZeRO needs deepspeed: pip install -e '.[deepspeed]' -c constraints.txt")
pytestmark = pytest.mark.parallel

LOSS = 1e-4
# Of what training moves a parameter by: Adam divides by a gradient's own size, rounding included.
MOVED = 1e-2
FULL: dict[str, Any] = {"segment": 48, "detach_every": 0}
# Answers at the end of texts of several lengths: windows without a target, processes with fewer segments.
TRUNCATED: dict[str, Any] = {"segment": 24, "detach_every": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    # C reads its memory outside of the memory's own forward, where ZeRO-3 has to find its parameters too.
    exported.exported(folder, "M-*-C-")
    exported.answers(folder)
    return folder


def train(root: Path, out: str, processes: int, **given: Any) -> Path:
    """Run the command line on so many processes."""
    options = {"batch": 2, "steps": 3, "lr": 1e-3, "save_every": 2, "validate_every": 3} | given
    data = str(root / "answers.jsonl")
    line = ["tools/finetune.py", str(root / "model"), "--data", data, "--validation", data, "--out", str(root / out)]
    line += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/kernels"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *(launcher if processes > 1 else []), *line]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return root / out


@pytest.fixture(scope="module")
def full(root: Path) -> Path:
    return train(root, "full", 1, **FULL)


@pytest.fixture(scope="module")
def truncated(root: Path) -> Path:
    return train(root, "truncated", 1, **TRUNCATED)


def validation(folder: Path) -> list[float]:
    history = json.loads((folder / REPORT).read_text())["history"]
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry]


def assert_same(root: Path, one: Path, two: Path) -> None:
    assert losses(one) == pytest.approx(losses(two), abs=LOSS)
    assert len(validation(one)) == 1 and validation(one) == pytest.approx(validation(two), abs=LOSS)
    before, expected, found = weights(root / "model"), weights(one), weights(two)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        moved = float((value - before[name]).norm())
        assert float((found[name] - value).norm()) <= MOVED * moved, name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_one_process_over_every_cut(root: Path, full: Path, stage: int) -> None:
    config = f"configs/deepspeed/zero{stage}.json"
    assert_same(root, full, train(root, f"zero{stage}", 2, deepspeed=config, **FULL))


@pytest.mark.parametrize("stage", [None, 1, 3])
def test_truncated_windows_are_as_many_on_every_process(root: Path, truncated: Path, stage: int | None) -> None:
    with_zero = {"deepspeed": f"configs/deepspeed/zero{stage}.json"} if stage else {}
    assert_same(root, truncated, train(root, f"truncated, {stage}", 2, **with_zero, **TRUNCATED))


def test_zero_goes_on_from_its_checkpoint(root: Path, full: Path) -> None:
    out = train(root, "stopped", 2, deepspeed="configs/deepspeed/zero2.json", **FULL)
    expected = {name: value.clone() for name, value in weights(out).items()}
    for file in out.iterdir():
        file.unlink()
    out.rmdir()
    newest = root / "stopped.training/checkpoint-3"
    (newest / "whole.json").unlink()
    again = train(root, "stopped", 2, deepspeed="configs/deepspeed/zero2.json", **FULL)
    for name, value in weights(again).items():
        assert torch.equal(value, expected[name]), name
