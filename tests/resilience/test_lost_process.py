"""A process that dies takes the others with it: soon, with one line that names it, never with a hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atlas_megatron.train import main
from atlas_megatron.training.metrics import METRICS
from atlas_megatron.training.trainer import Trainer
from tests.support import tiny_run
from tests.support.processes import PRELOADED, free_port

SAID = "ranks that do not answer: 1; look at the end of their logs"
SECONDS = 60  # of a run that goes on until one is killed


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("lost"))


def words(config: Path, folder: Path) -> list[str]:
    return [str(config), f"run.directory={folder}", "train.steps=100000", "train.validate_every=0", "memory.ns_steps=1"]


def die_or_speak(rank: int, port: int, given: list[str], lines: Path) -> None:
    """One process of two; the second is killed, or hangs, in the third step; the first writes its last words."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    step = Trainer._step

    def third(self: Trainer, number: int):
        if rank == 1 and number == 3:
            os.kill(os.getpid(), signal.SIGKILL if "parallel.timeout_minutes=30" in given else signal.SIGSTOP)
        return step(self, number)

    Trainer._step = third
    with lines.open("w") as sys.stderr:
        status = main(given)
    os._exit(status)


@pytest.mark.parametrize("minutes", ["30", "0.05"], ids=["killed", "hung"])
def test_the_other_ends_with_a_line(config: Path, tmp_path: Path, minutes: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    given = [*words(config, tmp_path / "run"), f"parallel.timeout_minutes={minutes}"]
    port, lines = free_port(), [tmp_path / "0", tmp_path / "1"]
    both = [context.Process(target=die_or_speak, args=(r, port, given, lines[r]), daemon=True) for r in (0, 1)]
    try:
        for process in both:
            process.start()
        both[0].join(SECONDS)
        assert both[0].exitcode == 3
        said = lines[0].read_text()
        assert said.count("atlas-train: ") == 1 and "Traceback" not in said
        last = said.splitlines()[-1]
        assert SAID in last and f"parallel.timeout_minutes={minutes};" in last
    finally:
        for process in both:
            process.kill()
            process.join()


@pytest.mark.parallel
def test_under_torchrun_too(config: Path, tmp_path: Path) -> None:
    paths = os.pathsep.join((str(tiny_run.ROOT / "kernels"), str(tiny_run.ROOT)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (tmp_path / "said").open("w") as said:
        torchrun = subprocess.Popen(
            [*launcher, "-m", "atlas_megatron.train", *words(config, tmp_path / "run")],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
    try:
        end = time.monotonic() + 2 * SECONDS
        metrics = tmp_path / "run" / METRICS
        while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
            assert time.monotonic() < end and torchrun.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.2)
        os.kill(_worker(torchrun.pid, rank=1), signal.SIGKILL)
        assert torchrun.wait(SECONDS) != 0
    finally:
        torchrun.kill()
        torchrun.wait()
    ours = [line for line in (tmp_path / "said").read_text().splitlines() if "atlas-train" in line]
    assert len(ours) == 1 and SAID in ours[0]


def _worker(parent: int, rank: int) -> int:
    """The process of a rank among a process's children."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    asked = f"RANK={rank}".encode()
    return next(int(child) for child in children if asked in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"))
