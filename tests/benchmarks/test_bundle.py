"""What is taken to a GPU without a package registry: it unpacks, runs there alone, and its kernels are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.gpu import bundle
from benchmarks.gpu.check import ROOT

# Of all that is installed, torch, Triton and numpy are there, with what they import.
ALONE = """
import sys

GONE = {"megatron", "rich", "einops", "transformers", "tokenizers", "tensorboard", "psutil", "pyarrow", "matplotlib",
        "pytest", "safetensors", "accelerate"}


class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in GONE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Gone())
"""


def test_what_is_unpacked_runs_with_torch_and_triton_alone(tmp_path: Path) -> None:
    out = tmp_path / "parts"
    out.mkdir()
    parts = bundle.pack(out, "code", [(ROOT / name, name) for name in bundle.tracked()], most=bundle.SPARE + 2 * 2**20)
    assert len(parts) > 1
    folder = tmp_path / "atlas"
    for part in parts:
        with tarfile.open(part) as archive:
            archive.extractall(folder, filter="data")
    (folder / "alone").mkdir()
    (folder / "alone/sitecustomize.py").write_text(ALONE, encoding="utf-8")
    path = os.pathsep.join(str(folder / name) for name in ("alone", "", "kernels"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(tmp_path / "found")]
    done = subprocess.run(
        words, cwd=folder, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found/check.json").read_text(encoding="utf-8"))
    assert not found["not_run"] and found["sections"]["machine"]["versions"]["torch"]


FOUND = """
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from atlas_kernels import gated_norm
from atlas_kernels.gpu.launch import recording
from benchmarks.gpu.bench import Compilations
from benchmarks.gpu.compiling import compile_for


class Driver:
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)


def call():
    y = torch.empty(2, 40, 3, 16, device="meta")
    return gated_norm(y, y.bfloat16(), torch.empty(3, 16, device="meta"), 1e-5, "triton")


if sys.argv[1] == "compile":
    with recording("{}") as variants:
        call()
    assert compile_for(variants[0], 90).is_dir()
else:  # as a GPU's process launches it, up to the launch itself
    driver.set_active(Driver())
    JITFunction.__getitem__ = lambda self, grid: lambda *a, **k: self.run(*a, grid=grid, warmup=True, **k)
    triton.knobs.compilation.listener = met = Compilations()
    call()
    assert (met.hits, met.misses) == (1, 0), met
"""


def test_a_launch_finds_what_was_compiled_elsewhere(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    for turn in ("compile", "launch"):
        words = [sys.executable, "-c", FOUND, turn]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr


def test_parts_stay_under_their_size(tmp_path: Path) -> None:
    files = []
    for number in range(6):
        file = tmp_path / f"{number}"
        file.write_bytes(os.urandom(2**20))
        files.append((file, f"data/{number}"))
    parts = bundle.pack(tmp_path, "data", files, most=bundle.SPARE + 5 * 2**19)
    assert [part.name for part in parts] == ["data.tgz", "data-2.tgz", "data-3.tgz"]
    names = []
    for part in parts:
        with tarfile.open(part) as archive:
            names += archive.getnames()
    assert names == [place for _, place in files] and not bundle.pack(tmp_path, "none", [])
    with pytest.raises(ValueError, match="one of its files is too large"):
        bundle.pack(tmp_path, "big", files[:1], most=2**19)


def test_packages_are_taken_as_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "PACKAGES", ("megatron-core", "no-such-package"))
    files, missing = bundle.installed()
    assert missing == ["no-such-package"]
    places = {place for _, place in files}
    assert "site/megatron/core/__init__.py" in places and not any("__pycache__" in place for place in places)


def test_an_architecture_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bundle.main(["--arch", "sm_90"])
    assert "--arch sm_90: choose of 80, 90, 100, by comma" in capsys.readouterr().err


def test_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundle, "PACKAGES", ("rich", "no-such-package"))
    assert bundle.main(["--no-cache", "--out", str(tmp_path / "parts")]) == 0
    said = capsys.readouterr().out
    assert "not installed here, so left out: no-such-package" in said and "code.tgz" in said and "site.tgz" in said
    with tarfile.open(tmp_path / "parts/code.tgz") as archive:
        assert {"COMMIT", "Makefile", "benchmarks/gpu/check.py"} <= set(archive.getnames())
    assert "make gpu-check" in (tmp_path / "parts/README.md").read_text(encoding="utf-8")


COMPILES = """
import sys
from functools import partial
import torch
from benchmarks.gpu import compiling, newton_schulz

S = torch.empty(8192, 16, 16, device="meta").requires_grad_()
compiling.calls = lambda: {"first": partial(newton_schulz.both, S), "again": partial(newton_schulz.both, S)}
compiling.main("90", "2", sys.argv[1])
constants = [c.value for v in compiling.variants(90) for c in v.constants[len(v.signature) - 1,]]
# Matrices a program, as on 132 multiprocessors: on the meta device all would go to two.
assert max(c for c in constants if isinstance(c, int)) < 1024, constants
"""


def test_what_the_check_launches_is_compiled_once_each(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    words = [sys.executable, "-c", COMPILES, str(tmp_path / "folders.json")]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    folders = json.loads((tmp_path / "folders.json").read_text(encoding="utf-8"))
    assert len(set(folders)) == 2 and all(list(Path(folder).glob("*.cubin")) for folder in folders)
