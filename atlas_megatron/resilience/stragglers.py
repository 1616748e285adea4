"""Which process is slow: the time that each spends on its own, compared every so many steps.

A step takes all processes equally long, as they wait for each other at its end. A process's own time is that of reading
its data and of its forward passes: in the backward and behind it all wait for the slowest. Tensor- and context-parallel
ranks wait in the forward too, so of those a whole group shows.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median_low
from typing import Any

import torch

from atlas_megatron.parallel import world
from atlas_megatron.parallel.device import device

# Of the median: a process beyond is named in a line.
SLOW = 1.25


class Stragglers:
    """Adds up this process's own time, and every `every` steps compares it with the others'; 0 never does."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._seconds, self._steps = 0.0, 0
        self._on_gpu = device().type == "cuda"
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def own(self, *, on_gpu: bool = False) -> Iterator[None]:
        """Within: what this process does without the others; on_gpu: in kernels, which run later than their call."""
        if not self._every:
            yield
        elif on_gpu and self._on_gpu:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            start_seconds = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start_seconds

    def timed[T](self, forward: Callable[..., T]) -> Callable[..., T]:
        """A forward pass whose time is this process's own."""

        def passing(*given: Any) -> T:
            with self.own(on_gpu=True):
                return forward(*given)

        return passing

    def after(self, step: int) -> dict[str, Any]:
        """The entries of this step's record; empty but for every `every`-th step. All kernels of the step are done.

        `slowest_rank`, its `slowest_seconds` and the `median_seconds` of all: own seconds a step since the last time.
        """
        self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._events.clear()
        self._steps += 1
        if not self._every or step % self._every:
            return {}
        own = torch.zeros(torch.distributed.get_world_size(), dtype=torch.float64, device=device())
        own[world.rank()] = self._seconds / self._steps
        self._seconds, self._steps = 0.0, 0
        torch.distributed.all_reduce(own)
        seconds = own.tolist()
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        return {"slowest_rank": slowest, "slowest_seconds": seconds[slowest], "median_seconds": median_low(seconds)}

    def line(self, found: dict[str, Any]) -> str:
        """Of entries that `after` gave, a line where a process is slow; every process calls it."""
        if not found or found["slowest_seconds"] <= SLOW * found["median_seconds"]:
            return ""
        rank = found["slowest_rank"]
        host = world.gathered(socket.gethostname())[rank]
        return (
            f"rank {rank} on {host} is slow: {found['slowest_seconds']:.3f} s of its own a step, in data and forward "
            f"passes, where the median is {found['median_seconds']:.3f} s"
        )
