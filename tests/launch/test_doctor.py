"""atlas-doctor: it runs on this machine, names what is missing, and a broken self-test is its exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from atlas_megatron import doctor

ROOT = Path(__file__).parents[2]


def test_it_runs_here_and_names_what_is_missing() -> None:
    paths = os.pathsep.join((str(ROOT / "kernels"), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-m", "atlas_megatron.doctor"],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.split()}
    assert torch.__version__ in lines["torch"] and "0.19.2" in lines["Megatron-Core"]
    assert "impl='" in next(line for line in done.stdout.splitlines() if "atlas_kernels, impl=" in line)
    assert done.stdout.count("works") >= 2
    for extra in doctor.EXTRAS:
        missing = find_spec(extra.module) is None
        assert (f"{extra.brings}: {extra.install}" in done.stdout) == missing


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The screen without what takes time."""
    for name in ("machine", "parts"):
        monkeypatch.setattr(doctor, name, dict)


def test_a_wrong_memory_is_its_exit_status(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = doctor.omega_memory

    def wrong(*given: object, impl: str) -> object:
        y, state = right(*given, impl=impl)
        return (y * 1.001 if impl == "chunked" else y), state

    monkeypatch.setattr(doctor, "all_reduce", lambda backend, size: "")
    assert doctor.main([]) == 0
    monkeypatch.setattr(doctor, "omega_memory", wrong)
    assert doctor.main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("atlas-doctor: self-test failed: memory, chunked against reference: y differs by 1.0e-03")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_wrong_sum_is_its_exit_status(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "memory_agrees", lambda: "")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)  # each process keeps its own
    assert doctor.main([]) == 1
    assert "all-reduce of two processes, gloo: the processes ended with [1, 1]" in capsys.readouterr().err
