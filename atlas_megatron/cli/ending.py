"""How a command ends where something goes wrong: one line on standard error, and a status that says whose turn it is.

Status 1 is NaN or inf and nothing else: launch/job.sbatch and people tell by it what a restart would mend. Python gives
1 to every error that nobody caught; here such an error has a status of its own.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import current_thread, main_thread
from types import TracebackType
from typing import Any, NamedTuple

NON_FINITE, USER, LOST, UNFORESEEN = 1, 2, 3, 5
# 128 and the signal's number, as shells say it.
INTERRUPTED, TERMINATED = 130, 143
UNTIL_SAID = 3  # seconds that a process leaves to the one that says what ends them all: torchrun stops all at the first
ON_MEMORY = "give it less at once, or take a machine with more memory"
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
# What to do about what the system says, where it does not say it itself.
ADVICE = {
    errno.ENOENT: "give one that is there",
    errno.EACCES: "ask for access to it, or give another place",
    errno.EPERM: "ask for access to it, or give another place",
    errno.EROFS: "give another place",
    errno.EEXIST: "give another name",
    errno.ENOTDIR: "a file lies where a folder is needed: give another place",
    errno.EISDIR: "give a file",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "look after the disk",
}
GONE = "who read the output has gone away; nothing more is done: send it to a file, or read it to its end"


class Terminated(SystemExit):
    """SIGTERM, as an error: what was begun is removed on the way."""


class NonFiniteError(ArithmeticError):
    """NaN or inf reached the loss, the gradients or a memory; training on would only hide it."""


class Ending(NamedTuple):
    """An exit status and the line that explains it."""

    status: int
    line: str


def ending_of(error: BaseException, on_memory: str) -> Ending | None:
    """What an error is to a user; None where it is none that somebody foresaw.

    on_memory: what this command's user can change where memory does not suffice.
    """
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
        # Of a copy, the second name is the target's.
        name = error.filename2 or error.filename
        where = f" for {name}" if name else ""
        return Ending(USER, f"{error.strerror}{where}; make room there, then start the same command again")
    if isinstance(error, UnicodeEncodeError):
        text = error.object[:200]
        return Ending(USER, f"{text!r} has no form in {error.encoding} ({error.reason}); give another name")
    if isinstance(error, OSError) and error.filename is not None and error.errno in ADVICE:
        return Ending(USER, f"{error.filename}: {error.strerror}; {ADVICE[error.errno]}")
    if isinstance(error, ValueError | OSError):
        return Ending(USER, said)
    if isinstance(error, ArithmeticError):
        return Ending(USER, f"a number is out of range ({said}); give a smaller one")
    if any(word in str(error) for word in NOT_WRITTEN):
        return Ending(USER, f"a file could not be written ({said}); make room, then start the same command again")
    return None


def command(
    name: str, work: Callable[[], int], *, on_memory: str = ON_MEMORY, left: str = "", says: bool = True
) -> int:
    """`ended`, and Ctrl-C too is a line and a status. left: what an interrupt leaves, or what to do then."""
    try:
        return ended(name, work, on_memory, left=left, says=says)
    except KeyboardInterrupt:
        return _said(name, Ending(INTERRUPTED, "; ".join(filter(None, ("interrupted", left)))), says)


def ended(name: str, work: Callable[[], int], on_memory: str, *, left: str = "", says: bool = True) -> int:
    """Do a command's work; its exit status. Interrupts and argparse's exits go through, SIGTERM ends as an error does.

    says: whether this process, of several that meet the same error, is the one to say it.
    """
    try:
        with _terminating():
            print_anything()
            status = work()
        return _with_output(name, status, says)
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except Terminated:
        return _said(name, Ending(TERMINATED, "; ".join(filter(None, ("ended by SIGTERM", left)))), says)
    except BaseException as error:
        found = ending_of(error, on_memory)
        if found is None and isinstance(error, SystemExit):
            # argparse's, after --help: which nobody may have taken.
            if not error.code and _with_output(name, 0, says):
                return USER
            raise
        return _said(name, found or unforeseen(error), says)


@contextmanager
def _terminating() -> Iterator[None]:
    """Within: SIGTERM raises Terminated, once; a second one kills."""
    if current_thread() is not main_thread() or signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        yield
        return
    process = os.getpid()

    def stop(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() != process:
            # A child that was forked: nothing of it is ours to remove.
            os.kill(os.getpid(), number)
        raise Terminated(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_anything() -> None:
    """What the terminal's encoding has no character for is shown by its number: a name or a text is no error."""
    output = sys.stdout
    # In the C locale it is ASCII, and bytes of names alone come through.
    if isinstance(output, io.TextIOWrapper) and (output.errors, output.encoding) != ("surrogateescape", "utf-8"):
        output.reconfigure(errors="backslashreplace")


def say_interrupts(name: str) -> None:
    """From here on Ctrl-C where nothing catches it, as while libraries are imported, is a line and no traceback."""

    def hook(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> Any:
        if not issubclass(kind, KeyboardInterrupt):
            return sys.__excepthook__(kind, error, at)
        _said(name, Ending(INTERRUPTED, "interrupted"), True)
        os._exit(INTERRUPTED)

    sys.excepthook = hook


def unforeseen(error: BaseException) -> Ending:
    """The ending of an error that nobody foresaw; its traceback goes to standard error first."""
    with suppress(OSError, ValueError):
        traceback.print_exception(error)
    return Ending(UNFORESEEN, f"unforeseen: {type(error).__name__}: {one_line(error)}; the traceback stands above")


def line_of(error: ValueError | OSError) -> str:
    """What a user's error is told as, where others than its own process tell it."""
    found = ending_of(error, ON_MEMORY)
    return found.line if found else one_line(error)


def one_line(error: BaseException) -> str:
    """What an error says, on a line of its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # What libraries add to the reason: how to look into them.
    return lines[0] if isinstance(error, RuntimeError) and lines else " ".join(lines)


def flushed() -> OSError | ValueError | None:
    """Bring what was printed on its way; else what was in the way, and from then on nothing is printed."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        return None
    except (OSError, ValueError) as error:
        with suppress(OSError, ValueError, AttributeError):
            # Python flushes once more when it ends, and would complain.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        return error


def _with_output(name: str, status: int, says: bool) -> int:
    """The status of work whose output is on its way; where it cannot be written, the work is not done."""
    error = flushed()
    return _said(name, ending_of(error, "") or Ending(USER, GONE), says) if error else status


def _said(name: str, ending: Ending, says: bool) -> int:
    flushed()
    if not says:
        time.sleep(UNTIL_SAID)
    with suppress(OSError, ValueError):
        if says and sys.stderr is not None:
            print(f"{name}: {ending.line}", file=sys.stderr, flush=True)
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
