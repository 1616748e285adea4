"""What lies in a run's directory, and what the directory is called, is text to the launchers and never a command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atlas_megatron.config import Config, RunConfig, to_toml
from tests.launch.test_scripts import CONFIG, JOB, LOCAL, NODE, ROOT, SLURM, TWO, Stubs, job, saved

# Spaces, quotes of both kinds, backslashes before letters that bash would read, a newline, a tab, and commands.
NAMES = (
    "a b", "it's", 'say "hi"', r"back\slash\n", "two\nlines", "tab\there", "$(touch EXECUTED)", "`touch EXECUTED`",
    "\x7f\x01é", "[a-z]*", "-x", "semi;colon&", "\\", '\\"', "中文",
)  # fmt: skip


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    return Stubs(tmp_path)


@pytest.mark.parametrize("number", range(2))
def test_a_jobs_shell_runs_nothing_that_a_run_holds(stubs: Stubs, tmp_path: Path, number: int) -> None:
    mark, run = tmp_path / "EXECUTED", tmp_path / "run"
    command = f"restarts[$(touch {mark})]"
    if number == 0:
        run.mkdir()
        (run / "config.toml").write_text(f"[train]\nsteps = {command}\n")
        act = "true"
    else:
        # A folder's name cannot hold a slash: the mark is made where the job runs.
        mark = ROOT / "EXECUTED"
        folder = run / "checkpoints" / "step_0+restarts[$(touch EXECUTED)]"
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text("{}")
        act = saved(tmp_path, 4)
    said = job(stubs, ON_SRUN=act)
    executed = mark.exists()
    mark.unlink(missing_ok=True)
    assert not executed
    assert f"requeued; it will go on from step {4 * number}" in said.stdout


@pytest.mark.parametrize("name", ["step_00000009.bak", "step_00000009_copy", "step_9", "step_best", "step_0000000x"])
def test_a_users_copy_is_no_progress(stubs: Stubs, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run" / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "complete.json").write_text("{}")
    assert "requeued; it will go on from step 3" in job(stubs, ON_SRUN=saved(tmp_path, 3)).stdout


@pytest.mark.parametrize("word", ["processes", "gpus", "limit"])
def test_what_is_counted_with_is_a_number(stubs: Stubs, tmp_path: Path, word: str) -> None:
    mark = tmp_path / "EXECUTED"
    for script in (JOB, NODE):
        given = {"launch": ROOT / "launch", "processes": 1, "gpus": 0, "limit": 1, "logs": tmp_path / "logs"}
        given |= {word: f"a[$(touch {mark})]"}
        if script == NODE:
            given = {"nodes": 1, "processes": 1, "gpus": given["gpus"], "logs": tmp_path / "logs"}
            given |= {"nodes" if word == "limit" else word: f"a[$(touch {mark})]"}
        words = [f"{name}={value}" for name, value in given.items()]
        said = stubs.run(script, *words, "--", CONFIG, SLURM_NODEID="0")
        assert said.returncode == 2 and "number" in said.stderr and not mark.exists()


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_directory_of_any_name_reaches_the_trainer(stubs: Stubs, tmp_path: Path, name: str) -> None:
    """Through local.sh, slurm.sh with and without a sweep, and job.sbatch: the very same text."""
    directory = f"runs/{name}"
    (tmp_path / "report.toml").write_text(to_toml(Config(run=RunConfig(directory))))
    (stubs.folder / "atlas-train").write_text(f"#!/usr/bin/env bash\ncat {tmp_path}/report.toml; echo fits: yes\n")
    shown = f"printf '%s\\0' \"$@\" >{tmp_path}/words"
    for command in ("torchrun", "sbatch", "srun"):
        (stubs.folder / command).write_text(f"#!/usr/bin/env bash\n{shown}\n")

    def words() -> list[str]:
        return (tmp_path / "words").read_text().split("\0")[:-1]

    assert stubs.run(LOCAL, CONFIG, f"run.directory={directory}").returncode == 0
    assert words()[-1] == f"run.directory={directory}"
    logs = ("--logs", str(tmp_path / "logs"))
    said = stubs.run(SLURM, *TWO, *logs, f"run.directory={directory}")
    assert said.returncode == 0, said.stderr
    assert f"directory={directory}" in words() and words()[-1] == f"run.directory={directory}"
    assert stubs.run(SLURM, *TWO, *logs, f"run.directory={directory}", "--array", "train.lr=1,2").returncode == 0
    assert f"directory={directory}" in words()
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    job(stubs, f"directory={directory}", "sweep=train.lr=1,2", **array)
    assert words()[-1] == f"run.directory={directory}-train.lr=2"


@pytest.mark.slow
def test_setup_makes_up_for_an_environment_without_pip(tmp_path: Path) -> None:
    for name in ("Makefile", "constraints.txt", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = str(Path(sys._base_executable))  # type: ignore[attr-defined]
    subprocess.run([python, "-m", "venv", "--without-pip", ".venv"], cwd=tmp_path, check=True)
    # Nothing is downloaded: setuptools is then not found, by a pip that is there.
    command, environment = ["make", "setup", f"PYTHON={python}"], {**os.environ, "PIP_NO_INDEX": "1"}
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ".venv has no working pip: installing it" in said.stdout, said.stderr
    assert "No module named pip" not in said.stderr and "setuptools" in said.stderr
    assert list((tmp_path / ".venv/lib").glob("python3*/site-packages/pip"))
