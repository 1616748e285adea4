"""One job at a time in a run's directory: who holds it is named, who is gone is followed."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread

import pytest

from atlas_megatron.resilience import run_lock
from atlas_megatron.resilience.run_lock import NAME, Holder, LostLockError, RunLock
from atlas_megatron.train import main
from tests.support import tiny_run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.2)


def nothing(line: str) -> None:
    raise AssertionError(line)


def left_behind(directory: Path, **changed: object) -> Holder:
    """A lock that nobody touches, of this process but for what is changed."""
    holder = replace(Holder.of_this_process(), **changed)  # type: ignore[arg-type]
    (directory / NAME).write_text(json.dumps(asdict(holder)))
    return holder


def test_it_is_there_while_it_is_held(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "new", nothing)
    written = json.loads((tmp_path / "new" / NAME).read_text())
    assert written["pid"] == os.getpid() and {"host", "started"} <= written.keys()
    lock.check()
    lock.release()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_living_holder_is_named(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, nothing)
    with pytest.raises(
        ValueError, match=f"is in use by process {os.getpid()} on .*, since 20.*; let it end or stop it"
    ):
        RunLock(tmp_path, nothing)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    lock.release()
    RunLock(tmp_path, nothing).release()


def test_of_a_killed_process_it_is_taken_over_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "600"])
    try:
        left_behind(tmp_path, pid=process.pid, ticks=run_lock._ticks(process.pid))
        with pytest.raises(ValueError, match=f"is in use by process {process.pid} on "):
            RunLock(tmp_path, nothing)
    finally:
        process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    # Dead, but still in the table of processes: whoever started it has not looked after it.
    said: list[str] = []
    lock = RunLock(tmp_path, said.append)
    assert len(said) == 1 and said[0].startswith(f"took over {tmp_path}/{NAME}: process {process.pid} on ")
    lock.check()
    lock.release()
    process.wait()


def test_a_number_that_is_another_process_by_now_is_nobody(tmp_path: Path) -> None:
    left_behind(tmp_path, ticks="1")
    said: list[str] = []
    RunLock(tmp_path, said.append).release()
    assert "took over" in said[0]


ELSEWHERE = {"kernel": "another machine's", "host": "n2", "token": "another"}


@pytest.mark.parametrize("hours", [-48, 0, 48], ids=lambda hours: f"{hours} h")
def test_on_another_machine_it_lives_while_it_is_touched(tmp_path: Path, hours: int) -> None:
    """Whatever the clock says that its times come from."""
    left_behind(tmp_path, **ELSEWHERE)
    path, ended = tmp_path / NAME, []

    def touch() -> None:
        while not ended:
            now = time.time() + 3600 * hours
            os.utime(path, (now, now))
            time.sleep(0.1)

    thread = Thread(target=touch)
    thread.start()
    said: list[str] = []
    with pytest.raises(ValueError, match="is in use by process .* on n2"):
        RunLock(tmp_path, said.append)
    ended.append(True)
    thread.join()
    assert "waiting to see whether it still lives" in said[0]
    # From now on nobody touches it.
    RunLock(tmp_path, said.append).release()
    assert f"took over {path}: process {os.getpid()} on n2" in said[-1]


def test_what_cannot_be_read_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("{")
    said: list[str] = []
    RunLock(tmp_path, said.append).release()
    assert "took over" in said[-1]


def test_of_two_that_take_it_over_one_gets_it(tmp_path: Path) -> None:
    left_behind(tmp_path, **ELSEWHERE)
    got: list[object] = []

    def take() -> None:
        try:
            got.append(RunLock(tmp_path, lambda line: None))
        except ValueError as error:
            got.append(str(error))

    both = [Thread(target=take) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    (lock,) = [each for each in got if isinstance(each, RunLock)]
    (refused,) = [each for each in got if isinstance(each, str)]
    assert "is in use by process" in refused
    lock.check()
    lock.release()


def test_who_lost_it_writes_nothing_more(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, nothing)
    before = left_behind(tmp_path, **ELSEWHERE)
    time.sleep(0.3)
    with pytest.raises(LostLockError, match="not this process's any more but of process .* on n2"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / NAME).read_text()) == asdict(before)


def test_a_second_job_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run.write(tmp_path)
    lock = RunLock(tmp_path / "run", nothing)
    assert main([str(config)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"atlas-train: {tmp_path}/run is in use by process {os.getpid()} on ")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]
    lock.release()
    assert main([str(config), "train.steps=1", "train.warmup_steps=0", "train.validate_every=0"]) == 0
    assert not (tmp_path / "run" / NAME).exists()
