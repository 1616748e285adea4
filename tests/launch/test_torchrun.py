"""torchrun as launch/local.sh starts it: the processes' status, without a trace of its own; signals reach them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atlas_megatron import train
from atlas_megatron.cli import ending

ROOT = Path(__file__).parents[2]
# What atlas-train does as far as the launcher sees it: it says a line, or saves when it is asked to stop.
SCRIPT = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
if sys.argv[1] == "error":
    time.sleep(3 * rank)
    rank or print("atlas-train: what is wrong", file=sys.stderr)
    sys.exit(2)
if sys.argv[1] == "killed":
    rank == 1 and os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    sys.exit(3)
asked = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: asked.append(number))
open(os.path.join(sys.argv[2], str(rank)), "w").close()
while not asked:
    time.sleep(0.05)
time.sleep(0.5)
open(os.path.join(sys.argv[2], f"{rank} saved"), "w").close()
"""


def start(folder: Path, what: str) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "atlas_megatron.cli.torchrun", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, str(folder / "script.py"), what, str(folder)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_users_error_is_its_line_and_status_2(tmp_path: Path) -> None:
    run = start(tmp_path, "error")
    _, said = run.communicate(timeout=120)
    assert run.returncode == 2
    assert said.splitlines() == ["atlas-train: what is wrong"]


def test_a_process_with_nothing_to_say_leaves_time_to_the_one_that_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun stops all as soon as one has failed, and a fast one would take the line with it."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def fails() -> int:
        raise ValueError("what is wrong")

    for rank, says, seconds in (("0", True, []), ("1", False, [ending.UNTIL_SAID])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        for name, of in (
            ("atlas-train", lambda: train.main([str(tmp_path / "none.toml")])),
            ("finetune", lambda says=says: ending.command("finetune", fails, says=says)),
        ):
            slept.clear()
            assert of() == 2 and slept == seconds
            assert capsys.readouterr().err.startswith(f"{name}: ") == says


@pytest.mark.slow
def test_a_killed_process_is_named(tmp_path: Path) -> None:
    run = start(tmp_path, "killed")
    _, said = run.communicate(timeout=120)
    assert run.returncode == 3
    assert said.splitlines() == ["local.sh: process 1 was ended by SIGKILL; see its last lines"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_reaches_the_processes_and_is_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    run = start(tmp_path, "wait")
    end = time.monotonic() + 60
    while not all((tmp_path / str(rank)).exists() for rank in range(2)):
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    run.send_signal(number)
    assert run.wait(60) == 0
    assert all((tmp_path / f"{rank} saved").exists() for rank in range(2))
