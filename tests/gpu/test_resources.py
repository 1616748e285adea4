"""Every kernel compiled for sm_80, sm_90 and sm_100, held to its registers, spills and shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import kernel_resources

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_no_kernel_takes_more_than_its_table():
    # Interpreted kernels cannot be compiled: conftest.py asks for the interpreter, a fresh process does not.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--check"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr


def test_what_grew_is_named():
    figures = {"registers": 64, "spilled": 0, "shared": 1024, "tensor_columns": 0, "instructions": ["wgmma"]}
    kept = {"kernel, sm_90": figures}
    assert kernel_resources.faults(kept, kept) == ([], [])
    bad, _ = kernel_resources.faults({"kernel, sm_90": figures | {"registers": 65}}, kept)
    assert bad == ["kernel, sm_90: registers grew from 64 to 65"]
    bad, _ = kernel_resources.faults({"kernel, sm_90": figures | {"instructions": []}}, kept)
    assert bad == ["kernel, sm_90: no tensor-core instructions, it had wgmma"]
    bad, good = kernel_resources.faults({"kernel, sm_90": figures | {"shared": 512}}, kept)
    assert not bad and good == ["kernel, sm_90: shared shrank from 1024 to 512"]


def test_what_cannot_be_launched_is_named():
    figures = {"registers": 64, "spilled": 0, "shared": 170000, "tensor_columns": 640, "instructions": []}
    bad, _ = kernel_resources.faults({name: figures for name in ("k, sm_80", "k, sm_90")}, {"k, sm_80": figures})
    assert any("k, sm_80: shared memory 170000 of 166912 bytes" in line for line in bad)
    assert not any("k, sm_90: shared" in line for line in bad)
    assert any("640 of 512 tensor memory columns" in line for line in bad)
    assert any("k, sm_90: not in resources.json" in line for line in bad)
