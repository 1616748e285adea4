"""Several processes of one run: the slow one is named, a hang ends all with their stacks, one lock is theirs."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from atlas_megatron.resilience import watchdog
from atlas_megatron.resilience.run_lock import RunLock
from atlas_megatron.train import main
from atlas_megatron.training import metrics
from atlas_megatron.training.trainer import Trainer
from tests.support import tiny_run
from tests.support.processes import PRELOADED, free_port

SECONDS = 300  # of anything here


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("watched"))


def both(words: list[str], folder: Path) -> tuple[list[int | None], list[str]]:
    """The exit statuses of two processes that train together, and all that each said."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    processes = [context.Process(target=speak, args=(r, port, words, folder / f"{r}"), daemon=True) for r in (0, 1)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS)
        return [process.exitcode for process in processes], [(folder / f"{r}").read_text() for r in (0, 1)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def speak(rank: int, port: int, words: list[str], said: Path) -> None:
    """One of them. The second is slow to read its data, and in the fifth step it hangs."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    target = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(target, 1)
    os.dup2(target, 2)
    watchdog.GRACE_SECONDS = 2.0
    step = Trainer._step

    def disturbed(self: Trainer, number: int) -> object:
        if number == 5:
            # As if the other minutes had gone by.
            self._watchdog._expect(5.0)
        if rank == 1:
            with self._stragglers.own():
                time.sleep(600 if number == 5 else 1)
        return step(self, number)

    Trainer._step = disturbed
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    os._exit(status)


@pytest.mark.parallel
def test_the_slow_one_is_named_and_a_hang_ends_both_with_their_stacks(config: Path, tmp_path: Path) -> None:
    words = [str(config), f"run.directory={tmp_path}/run", "train.validate_every=0", "memory.ns_steps=1"]
    watched = ["resilience.straggler_every=2", "resilience.hang_minutes=10", "train.steps=10"]
    statuses, said = both([*words, *watched], tmp_path)
    assert statuses == [watchdog.STATUS, watchdog.STATUS], said
    records = metrics.read(tmp_path / "run")
    assert [r.get("slowest_rank") for r in records] == [None, 1, None, 1]
    assert records[3]["slowest_seconds"] > 1 and records[3]["slowest_seconds"] > 1.25 * records[3]["median_seconds"]
    assert "step 4: rank 1 on " in said[0] and " is slow: " in said[0]
    # The first waits inside the step for the second, which is still before it.
    assert "in _step\n" in said[0] and "in disturbed\n" in said[1] and "in _step\n" not in said[1]
    for rank in (0, 1):
        assert said[rank].count(f"atlas-train: rank {rank} of 2 hung: ") == 1


def test_a_second_job_of_two_processes_says_one_line(config: Path, tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run", print)
    statuses, said = both([str(config), f"run.directory={tmp_path}/run"], tmp_path)
    assert statuses == [2, 2], said
    assert said[0].count("atlas-train: ") == 1 and f"is in use by process {os.getpid()}" in said[0]
    assert "atlas-train" not in said[1] and "Traceback" not in said[1]
    lock.release()
