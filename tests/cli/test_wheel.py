"""The wheel carries the kernels, the shipped configurations and the commands."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from atlas_megatron.config import load
from atlas_megatron.config.shipped import CONFIGS, config_file

ROOT = Path(__file__).parents[2]


def test_a_shipped_config_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(ROOT / "configs/scale/20m.toml")
    monkeypatch.chdir(tmp_path)
    assert load("configs/scale/20m.toml") == expected and CONFIGS == ROOT / "configs"
    own = tmp_path / "configs/scale"
    own.mkdir(parents=True)
    (own / "20m.toml").write_text("[train]\nsteps = 7\n")
    assert load("configs/scale/20m.toml").train.steps == 7
    assert config_file("configs/none.toml") == Path("configs/none.toml")


@pytest.mark.slow
def test_the_wheel_has_all_that_runs(tmp_path: Path) -> None:
    # A copy: building leaves build/ and egg-info beside setup.py.
    copy = tmp_path / "checkout"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kept = [name for name in files.split("\0") if name.startswith(("atlas_megatron/", "kernels/", "configs/"))]
    for name in [*kept, "setup.py", "pyproject.toml"]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, copy]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry,) = [name for name in names if name.endswith("entry_points.txt")]
        commands = archive.read(entry).decode()
    for name in kept:
        inside = name.removeprefix("kernels/")
        inside = f"atlas_megatron/{inside}" if inside.startswith("configs/") else inside
        if inside.endswith((".py", ".toml", ".list")) and inside.startswith("atlas_"):
            assert inside in names, f"the wheel lacks {inside}"
    for command in ("atlas-train", "atlas-eval", "atlas-generate", "atlas-serve", "atlas-sweep", "atlas-doctor"):
        assert f"{command} = " in commands
