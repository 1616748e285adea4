"""Ends a process whose step hangs: the stacks of all its threads, one line, and a status of its own.

Every process has one. All wait for each other in every step, so where one hangs, all of them write where they are.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from atlas_megatron.config import Config
from atlas_megatron.parallel import world
from atlas_megatron.parallel.world import RESUMES

STATUS = 4
STDERR = 2  # the process's own, whatever Python's is by now
LOOK_SECONDS = 1.0
# Between the stacks and the end: processes that noticed a little later write theirs before torchrun ends them.
GRACE_SECONDS = 5.0
# A thread cannot speak while the interpreter itself is stuck; faulthandler can, this much later, and ends it with 1.
STUCK = 1.25


class Watchdog:
    """Within: every step has to `beat` within resilience.hang_minutes; 0 watches nothing.

    Times are those of the monotonic clock, which nobody sets.
    """

    def __init__(self, config: Config) -> None:
        self._minutes = config.resilience.hang_minutes
        self._limit = 60 * self._minutes
        # The first step compiles, a checkpoint waits for a disk: what exchanges between processes are given there.
        self._longer = self._limit + 60 * config.parallel.timeout_minutes
        self._end_of_patience = 0.0
        self._ended = Event()
        self._thread = Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._limit:
            self._expect(self._longer)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._limit:
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()
            self._thread.join()

    def beat(self) -> None:
        """A step is done; the next has as long."""
        if self._limit:
            self._expect(self._limit)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Within: what rightly takes longer than a step."""
        if self._limit:
            self._expect(self._longer)
        yield
        self.beat()

    def _expect(self, seconds: float) -> None:
        self._end_of_patience = time.monotonic() + seconds
        faulthandler.dump_traceback_later(STUCK * seconds + GRACE_SECONDS, exit=True, file=STDERR)

    def _watch(self) -> None:
        while not self._ended.wait(min(LOOK_SECONDS, self._limit / 10)):
            if time.monotonic() > self._end_of_patience:
                self._end()
                return

    def _end(self) -> None:
        # While this thread can speak, the other stays silent: it would cut the lines short, and end with 1.
        self._expect(self._limit)
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        print(
            f"atlas-train: rank {world.rank()} of {world.size()} hung: no step was finished within resilience."
            f"hang_minutes={self._minutes:g}; the stacks of its threads are above; {RESUMES}",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(GRACE_SECONDS)
        os._exit(STATUS)
