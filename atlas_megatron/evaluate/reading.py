"""Contexts of any length, read through a model's state in segments, several side by side; and what that takes.

Dims: B contexts read at once.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from torch import Tensor

from atlas_megatron.inference.reader import Reader

SEGMENT = 2048  # tokens of each context that are read at once
PLAIN_LINE_SECONDS = 20.0  # between lines of progress where there is no terminal
RESET_PEAK = "5"  # what Linux takes in clear_refs to begin the peak of a process anew
_SHOWN = ContextVar("progress of a reading is shown", default=True)


@dataclass(frozen=True)
class Cost:
    """What reading took. tokens: of all contexts; peak: most bytes in use, of the process or of the GPU's tensors."""

    tokens: int
    seconds: float
    peak: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)


def read_contexts(
    reader: Reader, contexts: Sequence[Iterator[np.ndarray]], length: int, name: str, segment: int = SEGMENT
) -> Cost:
    """Begin new texts, one a row, and read `length` tokens of each; what the reader then knows is the state after them.

    contexts: int32 tokens in pieces of any size, which are never held whole. Shows progress under `name`. Raises
    ValueError where the state grows with the tokens and would not fit into memory.
    """
    check_room(reader, length, len(contexts))
    reader.forget()
    peak, started, done = PeakMemory(reader.device), time.perf_counter(), 0
    for tokens in watched(name, segments(contexts, segment), length, len(contexts), peak):
        reader.read(torch.from_numpy(tokens).to(reader.device, torch.int64), keep=1)
        done += tokens.shape[1]
    if reader.device.type == "cuda":
        torch.cuda.synchronize()
    if done != length:
        raise AssertionError(f"{name} holds {done:,} tokens, not {length:,}")
    return Cost(length * len(contexts), time.perf_counter() - started, peak.bytes())


def check_room(reader: Reader, length: int, rows: int) -> None:
    """Raise ValueError where so many texts of so many tokens would not fit into memory: full attention keeps them."""
    if not reader.growth:
        return
    # What is kept is joined anew for each segment: there are two of it for a moment.
    needed = 2 * reader.growth * length * rows
    free = torch.cuda.mem_get_info()[0] if reader.device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"a state that grows with every token would take {needed / 2**30:,.1f} GiB after {length:,} tokens of "
            f"{rows} texts, and {free / 2**30:,.1f} GiB are free; choose shorter lengths, fewer texts at once, or a "
            "model without full attention and exponential kernels"
        )


def segments(contexts: Sequence[Iterator[np.ndarray]], size: int) -> Iterator[np.ndarray]:
    """[B, size] of contexts of one length, side by side; the last one may be shorter."""
    waiting = [np.empty(0, np.int32) for _ in contexts]
    while True:
        for row, pieces in enumerate(contexts):
            while len(waiting[row]) < size and (piece := next(pieces, None)) is not None:
                waiting[row] = np.concatenate([waiting[row], piece])
        ready = min(size, *(len(row) for row in waiting)) if len(waiting) > 1 else min(size, len(waiting[0]))
        if ready == 0:
            return
        yield np.stack([row[:ready] for row in waiting])
        waiting = [row[ready:] for row in waiting]


def answers(reader: Reader, questions: Tensor, max_new_tokens: int) -> Tensor:
    """What the likeliest tokens [B, max_new_tokens] are after these questions [B, n], asked where the reader stands.

    After a row's end of document there are only more of these.
    """
    vocabulary, end = reader.tokenizer.vocab_size, reader.tokenizer.eod
    told: list[Tensor] = []
    ended = torch.zeros(len(questions), 1, dtype=torch.bool, device=reader.device)
    step = questions.to(reader.device)
    for _ in range(max_new_tokens):
        # Rows of the embedding beyond the tokenizer's vocabulary are never text.
        step = reader.read(step, keep=1)[:, -1, :vocabulary].argmax(-1, keepdim=True).masked_fill(ended, end)
        ended = ended | (step == end)
        told.append(step)
        if bool(ended.all()):
            break
    return torch.cat(told, 1)


class PeakMemory:
    """The most memory in use from its making on: of the GPU's tensors, else of the whole process."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._restarted = _restart_peak()

    def bytes(self) -> int:
        if self._gpu:
            return torch.cuda.max_memory_allocated()
        if self._restarted:
            status = Path("/proc/self/status").read_text(encoding="ascii")
            line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        # Where the system keeps one peak a process: that of its whole life.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _restart_peak() -> bool:
    """Begin the process's peak anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


@contextmanager
def unseen() -> Iterator[None]:
    """Within: readings show no progress, as where several processes read at once, or a run shows its own."""
    before = _SHOWN.set(False)
    try:
        yield
    finally:
        _SHOWN.reset(before)


def watched(
    name: str, pieces: Iterator[np.ndarray], length: int, rows: int, peak: PeakMemory
) -> Iterator[np.ndarray]:
    """The same pieces [rows, n], `length` tokens a row in all, with progress on standard error: a bar on a terminal,
    elsewhere a plain line now and then."""
    if not _SHOWN.get():
        yield from pieces
        return
    started = said = time.perf_counter()
    done, console = 0, Console(stderr=True)
    columns = (BarColumn(24), TaskProgressColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
    with bar or nullcontext():
        task = bar.add_task(name, total=length) if bar else None
        for piece in pieces:
            yield piece
            done += piece.shape[1]
            now = time.perf_counter()
            rate = done / max(now - started, 1e-9)
            speed, held = f"{rate * rows:,.0f} tokens/s", f"peak {peak.bytes() / 2**30:.2f} GiB"
            text = f"{name}: {speed}, {held}, {(length - done) / rate:,.0f} s left"
            if bar and task is not None:
                bar.update(task, completed=done, description=text)
            elif now - said > PLAIN_LINE_SECONDS:
                said = now
                print(f"{100 * done / length:.0f} % {text}", file=sys.stderr, flush=True)
