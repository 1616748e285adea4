"""A process of its own for what a test lets happen to it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch

from tests.support.processes import PRELOADED

SECONDS = 300  # until it is taken for hung


def forked(work: Callable[..., object], *given: object, lines: Path | None = None) -> int | None:
    """The exit status of a process of its own that does this work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_quietly, args=(lines, work, *given), daemon=True)
    process.start()
    process.join(SECONDS)
    try:
        return process.exitcode
    finally:
        process.kill()
        process.join()


def _quietly(lines: Path | None, work: Callable[..., object], *given: object) -> None:
    target = os.open(lines or os.devnull, os.O_WRONLY | os.O_CREAT)
    os.dup2(target, 1)
    os.dup2(target, 2)
    torch.set_num_threads(1)
    work(*given)
