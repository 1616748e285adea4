"""What an error is to a user: one line and a status, of which 1 is NaN alone."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from atlas_megatron.cli.ending import LOST, NON_FINITE, UNFORESEEN, USER, NonFiniteError, ended, ending_of, line_of
from atlas_megatron.parallel.world import LostProcessError

REMEDY = "take less"
SRC = Path(__file__).parents[2]


def raised(work: object) -> BaseException:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        work()  # type: ignore[operator]
    return caught.value


def closed_by_rich() -> BaseException:
    try:
        try:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904  as rich does
    except SystemExit as error:
        return error


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (NonFiniteError("step 3: loss is nan"), NON_FINITE, "step 3: loss is nan"),
        (OverflowError("int too large to convert to float"), USER, "a number is out of range"),
        (ZeroDivisionError("division by zero"), USER, "a number is out of range"),
        (FloatingPointError("underflow"), USER, "a number is out of range"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), USER, "who read the output has gone away"),
        (closed_by_rich(), USER, "who read the output has gone away"),
        (LostProcessError("rank 1 of 2 lost the others"), LOST, "rank 1 of 2 lost the others"),
        (MemoryError(), USER, "memory does not suffice (MemoryError); take less"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), USER, "2 GiB); take less"),
        (raised(lambda: torch.empty(1 << 60, dtype=torch.uint8)), USER, "memory does not suffice"),
        (raised(lambda: torch.empty(1 << 40, 1 << 40)), USER, "memory does not suffice"),
        (raised(lambda: numpy.empty(1 << 60, numpy.uint8)), USER, "memory does not suffice"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), USER, "No space left on device for /data/x"),
        (OSError(errno.ENOSPC, "No space left", "from", None, "to"), USER, "No space left for to; make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), USER, "Disk quota exceeded; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "/a b"), USER, "/a b: Permission denied; ask for access"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"), USER, "/a/b: Not a directory; a file lies"),
        (raised(lambda: "a\udcff".encode()), USER, r"'a\udcff' has no form in utf-8"),
        (SafetensorError("I/O error: File too large (os error 27)"), USER, "a file could not be written"),
        (CheckpointException("save", {0: (OSError(errno.ENOSPC, "No space left"), None)}), USER, "No space left; make"),
        (ValueError("train.lr=x is no number\n  give one"), USER, "train.lr=x is no number give one"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_foreseen_is_one_line_with_its_status(error: BaseException, status: int, words: str) -> None:
    found = ending_of(error, REMEDY)
    assert found and found.status == status and words in found.line and "\n" not in found.line


def test_what_nobody_foresaw_is_told_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("atlas-x", lambda: {}["missing"], REMEDY) == UNFORESEEN
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1].startswith("atlas-x: unforeseen: KeyError: 'missing'")


def test_a_line_of_another_process_is_the_same() -> None:
    assert line_of(OSError(errno.ENOSPC, "No space left")).startswith("No space left; make room there")
    assert line_of(FileNotFoundError(errno.ENOENT, "No such file", "a")) == "a: No such file; give one that is there"
    assert line_of(ValueError("a\n b")) == "a b"


def test_argparses_exit_and_ctrl_c_go_through() -> None:
    for error in (SystemExit(2), KeyboardInterrupt()):

        def work(error: BaseException = error) -> int:
            raise error

        with pytest.raises(type(error)):
            ended("atlas-x", work, REMEDY)


@pytest.mark.parametrize("target", ["closed", "/dev/full"])
def test_an_output_that_nobody_takes_is_a_line_and_not_the_status_of_nan(target: str) -> None:
    program = (
        "import sys; from atlas_megatron.cli.ending import ended\n"
        "def work():\n    for number in range(20000): print(number)\n    return 0\n"
        "sys.exit(ended('atlas-x', work, ''))"
    )
    read, write = os.pipe()
    os.close(read)
    full = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=write if target == "closed" else full, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join((str(SRC), str(SRC / "kernels")))}, check=False,
    )  # fmt: skip
    os.close(write)
    os.close(full)
    assert (done.returncode, done.stderr.count("\n")) == (USER, 1), done.stderr
    assert ("gone away" if target == "closed" else "No space left") in done.stderr


