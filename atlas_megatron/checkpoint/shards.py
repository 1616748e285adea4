"""Megatron's sharded states on the disk: every process writes its part, at once or while training goes on."""

from __future__ import annotations

import queue
from pathlib import Path
from threading import Thread
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from atlas_megatron.files import integrity
from atlas_megatron.parallel import world


def write_shards(state: dict[str, Any], folder: Path) -> None:
    """Write a sharded state into an empty folder; every process calls it, and returns when all have written."""
    _keep_results_here()
    dist_checkpointing.save(state, str(folder))


def checksums_of_own(folder: Path) -> dict[str, str]:
    """The checksums of the files that this process has written there, by name."""
    return integrity.checksums(sorted(folder.glob(f"__{world.rank()}_*.distcp")))


class ShardWriting:
    """The same by a thread: what training changes is copied to the CPU first, and written from there."""

    def __init__(self, state: dict[str, Any], folder: Path) -> None:
        """Begin; every process does so. Raises what `write_shards` raises where it cannot begin."""
        _keep_results_here()
        self.checksums: dict[str, str] = {}  # of this process's files, once they are written
        self._unread: OSError | None = None
        dict_list_map_inplace(_copied, state)
        # Core's own strategy, executed by a thread instead of a fork, which would not outlive CUDA or gloo.
        self._request = dist_checkpointing.save(state, str(folder), async_sharded_save=True, async_strategy="mcore")
        arguments = list(self._request.async_fn_args)
        if self._request.preload_fn is not None:
            arguments[1] = self._request.preload_fn()
        self._thread = Thread(target=self._write, args=(arguments, folder))
        self._thread.start()

    def _write(self, arguments: list[Any], folder: Path) -> None:
        # A process whose every part is another's copy has nothing to write.
        if self._request.async_fn is not None:
            self._request.async_fn(*arguments, **self._request.async_fn_kwargs)
        try:
            self.checksums = checksums_of_own(folder)
        except OSError as error:
            self._unread = error

    def busy(self) -> bool:
        """Whether this process still writes."""
        return self._thread.is_alive()

    def finish(self) -> None:
        """Wait for every process's part, then write what describes them; every process calls it.

        Raises CheckpointException, on all of them, where one could not write; OSError where what this process wrote
        cannot be read again.
        """
        self._thread.join()
        for function in self._request.finalize_fns:
            function()
        if self._unread:
            raise self._unread


def _keep_results_here() -> None:
    # Core would pass write results through a manager process of its own, made for writers in another process: it costs
    # seconds to start, and dies where a scheduler sends SIGTERM to every process, just when the last checkpoint is due.
    filesystem_async._results_queue = queue.Queue()


def _copied(part: Any) -> Any:
    if isinstance(part, ShardedTensor | ShardedTensorFactory) and isinstance(part.data, Tensor):
        # Detached: a factory cuts it, which autograd would follow.
        part.data = part.data.detach().cpu().clone()
    return part
