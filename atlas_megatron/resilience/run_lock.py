"""One job at a time writes into a run's directory: `run.lock` names the process that does.

The first process of a run holds it, and touches the file as long as it lives. A lock is stale where its process is
gone: on the same machine that is looked up, of another machine it is seen by a file that is not touched any more. Only
whether the file's time changes is read from it, never what it says: clocks of machines differ, and jump.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from threading import Event, Thread

from atlas_megatron.cli.ending import line_of
from atlas_megatron.parallel import world

NAME = "run.lock"
REFUSED = 2  # atlas-train's status of a user's error
BEAT_SECONDS = 5.0
# A file not touched for so long is of a process that is gone. Network disks show a change only seconds later.
STALE_SECONDS = 60.0
# Two processes can find the same stale lock: after this long, the file says which of them it is.
SETTLE_SECONDS = 1.0
# What exFAT and many network and FUSE file systems say of a hard link; EMLINK: a file may have no second name.
NO_LINKS = (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.EXDEV)


class LostLockError(ConnectionError):
    """Another process took the directory over, as this one had not touched its lock for long."""


@dataclass(frozen=True)
class Holder:
    """A process, as others can recognise it."""

    host: str
    pid: int
    started: str  # for people
    kernel: str  # this boot of this machine, and the process's own numbering in containers; empty: unknown
    ticks: str  # when the process started, in the kernel's count: a number may be another process's by now
    token: str  # of this holding alone

    @staticmethod
    def of_this_process() -> Holder:
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        pid = os.getpid()
        return Holder(socket.gethostname(), pid, started, _kernel(), _ticks(pid), uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"

    def text(self) -> str:
        """As the file has it."""
        return json.dumps(asdict(self), indent=1)

    def lives(self) -> bool | None:
        """Whether the process is there; None where that cannot be looked up from here."""
        if not self.kernel or self.kernel != _kernel():
            return None
        return bool(self.ticks) and _ticks(self.pid) == self.ticks


@contextmanager
def held(run_directory: str | Path, say: Callable[[str], None]) -> Iterator[RunLock | None]:
    """Within: this run alone writes there. Every process calls it, the world joined; the first gets the lock.

    Raises ValueError where another job holds it, in the first process; the others end with the same status, silently.
    """
    lock, refusal = None, ""
    if world.rank() == 0:
        try:
            lock = RunLock(Path(run_directory), say)
        except (ValueError, OSError) as error:
            refusal = line_of(error)
    (refusal,) = world.from_first([refusal])
    if refusal:
        raise ValueError(refusal) if world.rank() == 0 else SystemExit(REFUSED)
    try:
        yield lock
    finally:
        if lock:
            lock.release()


class RunLock:
    """The held lock of a run's directory."""

    def __init__(self, directory: Path, say: Callable[[str], None], key: str = "run.directory") -> None:
        """Take it. key: what the user names the directory by.

        Raises ValueError where another process holds it, OSError where nothing can be written there.
        """
        self._key = key
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / NAME
        self._own = Holder.of_this_process()
        while not (self._create() or self._take_over(say)):
            pass
        # By the open file: where another took the lock over, its file is not touched.
        self._file = os.open(self._path, os.O_RDWR)
        self._released = Event()
        self._thread = Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise LostLockError where another process has taken the directory over."""
        holder = _read(self._path)
        if holder is None or holder.token != self._own.token:
            raise LostLockError(
                f"{self._path} is not this process's any more but of {holder or 'nobody: it was removed'}; this one "
                "writes nothing more: let one job run at a time"
            )

    def release(self) -> None:
        """Let others write there; a lock that is another's by now stays."""
        self._released.set()
        self._thread.join()
        os.close(self._file)
        holder = _read(self._path)
        if holder and holder.token == self._own.token:
            self._path.unlink()

    def _create(self) -> bool:
        """Write the file where there is none; whole from the start, so that nobody reads half of it."""
        written = self._write()
        try:
            os.link(written, self._path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            return self._create_in_place()
        finally:
            written.unlink()
        return True

    def _create_in_place(self) -> bool:
        """The same where the file system has no hard links: for a moment others may read half of it, and wait."""
        try:
            with self._path.open("x", encoding="utf-8") as file:
                file.write(self._own.text())
        except FileExistsError:
            return False
        return True

    def _write(self) -> Path:
        written = self._path.with_name(f"{NAME}.{self._own.token}")
        written.write_text(self._own.text(), encoding="utf-8")
        return written

    def _take_over(self, say: Callable[[str], None]) -> bool:
        """Make a stale lock this process's; False where it changed meanwhile and all begins anew.

        Raises ValueError where it is not stale, or another was faster.
        """
        holder = _read(self._path)
        lives = holder.lives() if holder else None
        if lives is None:
            before = _touched(self._path)
            if before is None:
                return False
            say(f"{self._path} is held by {holder or 'an unreadable entry'}: waiting to see whether it still lives")
            lives = _is_touched(self._path, before)
        if lives:
            raise ValueError(
                f"{self._path.parent} is in use by {holder or 'another process'}; let it end or stop it, or choose "
                f"another {self._key}"
            )
        if _read(self._path) != holder:
            return False
        os.replace(self._write(), self._path)
        time.sleep(SETTLE_SECONDS)
        now = _read(self._path)
        if now != self._own:
            raise ValueError(f"{self._path.parent} is in use by {now}, which was faster; choose another {self._key}")
        say(f"took over {self._path}: {holder or 'its holder'} is gone")
        return True

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            # A network disk may come back; where the file is gone for good, `check` says so.
            with suppress(OSError):
                os.utime(self._file)


def _read(path: Path) -> Holder | None:
    """Who holds a lock; None where there is none, or nothing that can be read."""
    try:
        holder = Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    words = (holder.host, holder.started, holder.kernel, holder.ticks, holder.token)
    return holder if type(holder.pid) is int and all(isinstance(word, str) for word in words) else None


def _touched(path: Path) -> int | None:
    """The file's time; None where there is no file."""
    try:
        # Opened: a network disk then asks its server, and not what it remembers.
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _is_touched(path: Path, before: int) -> bool:
    """Whether the file's time becomes another within STALE_SECONDS; False too where it goes away."""
    end = time.monotonic() + STALE_SECONDS
    while (now := _touched(path)) == before and time.monotonic() < end:
        time.sleep(min(1.0, STALE_SECONDS / 10))
    return now not in (before, None)


def _kernel() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _ticks(pid: int) -> str:
    """When a process started, in the kernel's count; empty where there is none, or one that has ended."""
    try:
        # Behind the command's name, which may hold anything: the state first, the start as the 20th.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
