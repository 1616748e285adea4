"""How a scheduler or a person asks a run to stop: a signal that is only noted, so that the step in hand ends with a
checkpoint."""

from __future__ import annotations

import os
import signal
import time
from types import TracebackType
from typing import Any

# SIGTERM: preemption, a cancelled job, torchrun's own end. SIGUSR1: what launch/slurm.sh sends before the time limit.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# One Ctrl-C reaches a process twice where a launcher hands on what the terminal sends to all: it counts once.
ONE_PRESS_SECONDS = 0.5


class StopSignals:
    """Within: SIGTERM, SIGUSR1 and, once `can_save` is set, a first Ctrl-C are noted; a second Ctrl-C interrupts.

    A scheduler and torchrun may both send a signal, to any of the processes. Before `can_save` there is no step to
    save, and Ctrl-C interrupts at once. A process that was started with SIGINT ignored goes on ignoring it.
    """

    def __init__(self) -> None:
        self.asked = ""  # what came last: a signal's name, or Ctrl-C
        self.can_save = False
        self._pressed = 0.0  # when the first Ctrl-C was noted
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if not self._before:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._note_key)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """From here on signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: Any) -> None:
        self.asked = signal.Signals(number).name

    def _note_key(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if not self.can_save or (self._pressed and now - self._pressed > ONE_PRESS_SECONDS):
            raise KeyboardInterrupt
        if not self._pressed:
            self._pressed, self.asked = now, "Ctrl-C"
            if os.environ.get("RANK", "0") == "0":
                # Not print: the signal may have come in the middle of one.
                os.write(2, b"\nCtrl-C: saves after the step in hand and stops; once more stops at once\n")
