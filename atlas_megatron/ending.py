"""How a command ends where something goes wrong: one line on standard error, and a status that says whose turn it is.

Status 1 is NaN or inf and nothing else: launch/job.sbatch and people tell by it what a restart would mend. Python gives
1 to every error that nobody caught; here such an error has a status of its own.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

NON_FINITE, USER, LOST, UNFORESEEN = 1, 2, 3, 5
# What says in a RuntimeError, which has no type of its own, that memory could not be had.
NO_MEMORY = (
    *("out of memory", "not enough memory", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc"),
    *("Storage size calculation overflowed", "OutOfMemory", "failed to allocate"),
)
# And that a file could not be written: torch's and safetensors' writers.
NOT_WRITTEN = (
    *("PytorchStreamWriter", "inline_container", "No space left", "File too large", "Disk quota", "I/O error"),
    "Worker failure",  # Megatron's, of a part of a checkpoint
)
GONE = "who read the output has gone away; nothing more is done: send it to a file, or read it to its end"


class Ending(NamedTuple):
    """An exit status and the line that explains it."""

    status: int
    line: str


def ending_of(error: BaseException, on_memory: str) -> Ending | None:
    """What an error is to a user; None where it is none that somebody foresaw.

    on_memory: what this command's user can change where memory does not suffice.
    """
    from atlas_megatron.non_finite import NonFiniteError

    error = _cause(error)
    said = one_line(error)
    if isinstance(error, NonFiniteError):
        return Ending(NON_FINITE, said)
    if isinstance(error, BrokenPipeError):
        return Ending(USER, GONE)
    if isinstance(error, ConnectionError):
        return Ending(LOST, said)
    if isinstance(error, MemoryError) or any(word in str(error) for word in NO_MEMORY):
        return Ending(USER, f"memory does not suffice ({said or 'MemoryError'}); {on_memory}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f" for {error.filename}" if error.filename else ""
        return Ending(USER, f"{error.strerror}{where}; make room there, then start the same command again")
    if isinstance(error, ValueError | OSError):
        return Ending(USER, said)
    if isinstance(error, ArithmeticError):
        return Ending(USER, f"a number is out of range ({said}); give a smaller one")
    if any(word in str(error) for word in NOT_WRITTEN):
        return Ending(USER, f"a file could not be written ({said}); make room, then start the same command again")
    return None


def ended(command: str, work: Callable[[], int], on_memory: str, *, says: bool = True) -> int:
    """Do a command's work; its exit status. Interrupts and argparse's exits go through.

    says: whether this process, of several that meet the same error, is the one to say it.
    """
    try:
        status = work()
        return status if flushed() else _said(command, Ending(USER, GONE), says)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        found = ending_of(error, on_memory)
        if found is None and isinstance(error, SystemExit):
            raise
        return _said(command, found or unforeseen(error), says)


def unforeseen(error: BaseException) -> Ending:
    """The ending of an error that nobody foresaw; its traceback goes to standard error first."""
    with suppress(OSError, ValueError):
        traceback.print_exception(error)
    return Ending(UNFORESEEN, f"unforeseen: {type(error).__name__}: {one_line(error)}; the traceback stands above")


def one_line(error: BaseException) -> str:
    """What an error says, on a line of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # What libraries add to the reason: how to look into them.
    return lines[0] if isinstance(error, RuntimeError) and lines else " ".join(lines)


def flushed() -> bool:
    """Bring what was printed on its way; False where nobody takes it, and from then on nothing is printed."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        return True
    except (OSError, ValueError):
        with suppress(OSError, ValueError, AttributeError):
            # Python flushes once more when it ends, and would complain.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return False


def _said(command: str, ending: Ending, says: bool) -> int:
    flushed()
    with suppress(OSError, ValueError):
        if says:
            print(f"{command}: {ending.line}", file=sys.stderr, flush=True)
    return ending.status


def _cause(error: BaseException) -> BaseException:
    """The error below those that libraries make of it."""
    # rich ends the process where its output is closed.
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        return error.__context__
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        # torch.distributed.checkpoint's: by process, each with its traceback.
        return _cause(next(iter(failures.values()))[0])
    return error
