"""How a scheduler asks a run to stop: a signal that is only noted, so that the step in hand ends with a checkpoint."""

from __future__ import annotations

import signal
from types import TracebackType
from typing import Any

# SIGTERM: preemption, a cancelled job, torchrun's own end. SIGUSR1: what launch/slurm.sh sends before the time limit.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Ends the last line of a run that stopped for what a restart mends: launch/job.sbatch requeues by it.
RESUMES = "start the same command again: it resumes from the newest whole checkpoint"


class StopSignals:
    """Within: SIGTERM and SIGUSR1 are noted. A scheduler and torchrun may both send one, to any of the processes."""

    def __init__(self) -> None:
        self.asked = ""  # the name of the last one that came
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if not self._before:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
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
