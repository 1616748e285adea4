"""torchrun for `launch/local.sh`: the same words, but what ends a run is said once, by the run, and is its status.

torchrun itself adds twenty lines of its own trace, and ends with 1 whatever the run ended with.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress

# atlas-train's status where a process is lost: here one that was killed.
LOST = 3
# What a person or a scheduler sends. Handled, not ignored: what is ignored would be ignored in the processes too.
HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main(words: Sequence[str] | None = None) -> int:
    """Run torchrun's command line; the status of the process that failed first, else 0.

    Signals that ask to stop go to the processes, which save: this one waits for them, however long that takes.
    """
    warnings.filterwarnings("ignore", module=r"torch\.")
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    for number in HANDED_ON:
        signal.signal(number, lambda number, _: _hand_on(number))
    given = list(sys.argv[1:] if words is None else words)
    if "--standalone" in given:
        # A new machine's own name may resolve nowhere; its processes meet at one that always does.
        given = ["--local-addr", "127.0.0.1", *given]
    try:
        # What torchrun handles itself it ends on, and kills its processes half a minute later.
        run.main(["--signals-to-handle", "SIGQUIT", *given])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else _killed(failure.local_rank, -failure.exitcode)
    return 0


def _killed(rank: int, number: int) -> int:
    known = {each.value: each.name for each in signal.Signals}
    print(f"local.sh: process {rank} was ended by {known.get(number, number)}; see its last lines", file=sys.stderr)
    return LOST


def _hand_on(number: int) -> None:
    # Linux lists a process's children there; elsewhere a terminal's Ctrl-C reaches them all the same.
    with suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        for child in file.read().split():
            with suppress(ProcessLookupError):
                os.kill(int(child), number)


if __name__ == "__main__":
    sys.exit(main())
