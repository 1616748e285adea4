"""Real SLURM jobs of two nodes: saved, requeued and resumed, they end where an undisturbed one does."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atlas_megatron.training.metrics import METRICS
from tests.support import slurm_cluster, tiny_run
from tests.support.tiny_run import losses

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=f"not installed: {' '.join(slurm_cluster.missing())}"),
]
SECONDS = 90  # that any one thing may take
WORDS = ["--nodes", "2", "--gpus-per-node", "0", "--partition", "cpu", "train.steps=50", "train.validate_every=0"]
WORDS += ["memory.ns_steps=1", "checkpoint.every=1000"]


class Slurm:
    """A cluster, and a config to train on it."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root, self.config = root, tiny_run.write(root)
        self.environment = {**environment, "ATLAS_BIN": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "1"}

    def run(self, *command: str | Path) -> str:
        return subprocess.run(
            command, env=self.environment, cwd=tiny_run.ROOT, capture_output=True, text=True, check=True
        ).stdout

    def submit(self, name: str, *words: str) -> str:
        script = tiny_run.ROOT / "launch/slurm.sh"
        given = ["--job-name", name, "--logs", str(self.root), f"run.directory={self.root}/{name}"]
        said = self.run(script, self.config, *WORDS, *given, *words)
        return said.split("job ")[-1].split(";")[0]

    def state(self, job: str) -> str:
        return self.run("scontrol", "show", "job", job, "--oneliner").split("JobState=")[1].split()[0]

    def out(self, name: str, job: str) -> str:
        path = self.root / f"{name}-{job}.out"
        return path.read_text() if path.is_file() else ""

    def records(self, name: str) -> int:
        path = self.root / name / METRICS
        return path.read_text().count("\n") if path.is_file() else 0

    def requeued(self, job: str) -> None:
        """Waits until it is back in the queue, and lets it start at once instead of in two minutes."""
        until(lambda: self.state(job) == "PENDING", lambda: self.run("squeue"))
        # Not before the next second: a node takes no job whose end it noted in this one.
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now+3")

    def ended(self, job: str) -> str:
        until(lambda: self.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), lambda: self.run("squeue"))
        return self.state(job)


def until(true: Callable[[], object], said: Callable[[], str]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, said()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield Slurm(tmp_path_factory.mktemp("shared"), environment)


def test_disturbed_three_times_it_ends_where_an_undisturbed_one_does(slurm: Slurm) -> None:
    first = slurm.submit("undisturbed")
    assert slurm.ended(first) == "COMPLETED", slurm.out("undisturbed", first)
    job = slurm.submit("disturbed")
    out = lambda: slurm.out("disturbed", job)  # noqa: E731

    # What SLURM does before the time limit: the batch script alone hears it.
    until(lambda: slurm.records("disturbed") >= 3, out)
    slurm.run("scancel", "--signal=USR1", "--batch", job)
    slurm.requeued(job)
    saved = slurm.records("disturbed")
    assert 3 < saved < 50 and f"requeued; it will go on from step {saved}" in out()

    # Preemption with a grace time: every process of the step, torchrun too.
    until(lambda: slurm.records("disturbed") >= saved + 3, out)
    slurm.run("scancel", "--signal=TERM", job)
    slurm.requeued(job)
    again = slurm.records("disturbed")
    assert saved < again < 50 and f"requeued; it will go on from step {again}" in out()

    # A process that dies takes the start with it; the steps since the checkpoint are done again.
    until(lambda: slurm.records("disturbed") >= again + 3, out)
    os.kill(worker(slurm.config, rank=1), signal.SIGKILL)
    slurm.requeued(job)
    assert f"requeued; it will go on from step {again}" in out()

    assert slurm.ended(job) == "COMPLETED", out()
    assert "done at step 50" in out()
    assert (slurm.root / f"disturbed-{job}" / "starts").read_text().split() == ["0", *map(str, (saved, again, again))]
    assert losses(slurm.root / "disturbed") == losses(slurm.root / "undisturbed")
    logs = slurm.root / f"disturbed-{job}"
    for node in ("n1", "n2"):
        assert (logs / f"node-{node}.log").read_text().count(f"node {node}, start ") == 4
        assert len(list((logs / "start-0" / node).rglob("stderr.log"))) == 1


def test_a_cancelled_job_saves_and_stays_cancelled(slurm: Slurm) -> None:
    job = slurm.submit("cancelled", "train.steps=100000")
    until(lambda: slurm.records("cancelled") >= 3, lambda: slurm.out("cancelled", job))
    slurm.run("scancel", job)
    assert slurm.ended(job) == "CANCELLED"
    steps = slurm.records("cancelled")
    assert (slurm.root / "cancelled" / "checkpoints" / f"step_{steps:08d}" / "complete.json").is_file()
    until(lambda: "not requeued here" in slurm.out("cancelled", job), lambda: slurm.out("cancelled", job))
    assert slurm.state(job) == "CANCELLED"


def test_what_a_restart_would_not_mend_is_not_requeued(slurm: Slurm) -> None:
    # Missing before, slurm.sh would not submit it: they go while the job starts.
    gone = [slurm.root / f"nothing{suffix}" for suffix in (".bin", ".idx")]
    for copy in gone:
        shutil.copy(slurm.config.with_name(f"train{copy.suffix}"), copy)
    job = slurm.submit("wrong", f"data.train={slurm.root}/nothing")
    for copy in gone:
        copy.unlink()
    assert slurm.ended(job) == "FAILED", slurm.out("wrong", job)
    said = slurm.out("wrong", job)
    assert "stopped, for a restart would change nothing: atlas-train: " in said and f"{slurm.root}/nothing" in said


def worker(config: Path, rank: int) -> int:
    """The process of a rank that trains this config."""
    asked = f"RANK={rank}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            # torchrun has the same words, but no rank.
            if str(config).encode() in words and asked in (process / "environ").read_bytes().split(b"\0"):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no process of rank {rank}")
