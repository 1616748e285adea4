"""A start under bad conditions: a signal that comes too early, a port that is taken."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atlas_megatron.train import main
from tests.support import tiny_run


def test_a_signal_while_python_still_imports_is_not_lost(tmp_path: Path) -> None:
    """Under launch/node.sh, which ignores it, it would go unheard; by itself it would kill."""
    paths = os.pathsep.join((str(tiny_run.ROOT / "kernels"), str(tiny_run.ROOT)))
    words = [str(tiny_run.write(tmp_path)), "checkpoint.every=100", "train.validate_every=0"]
    run = subprocess.Popen(
        [sys.executable, "-m", "atlas_megatron.train", *words],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
    )
    try:
        while "SIGUSR1" not in caught(run.pid):
            assert run.poll() is None
            time.sleep(0.005)
        # Long before anything heavy is there.
        assert "libtorch" not in Path(f"/proc/{run.pid}/maps").read_text()
        run.send_signal(signal.SIGUSR1)
        said, _ = run.communicate(timeout=300)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 0 and "SIGUSR1: stopped after step 1, saved" in said


def caught(pid: int) -> set[str]:
    """The signals that a process handles."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), 16)
    return {number.name for number in signal.Signals if mask >> (number - 1) & 1}


def test_a_port_in_use_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        assert main([str(tiny_run.write(tmp_path))]) == 2
    said = capsys.readouterr().err
    assert f"atlas-train: port {port} of this machine is in use" in said and said.count("atlas-train") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
