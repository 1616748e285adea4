"""Processes of one gloo world for a test: forked from a server that has imported everything once."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from atlas_megatron.parallel import cpu
from atlas_megatron.parallel.context import settle
from atlas_megatron.parallel.device import backend

PRELOADED = [__name__, "atlas_megatron.training.trainer"]
SECONDS = 150  # until a world that says nothing is taken for hung


def run[T](size: int, work: Callable[..., T], *given: Any, seconds: float = SECONDS) -> list[T]:
    """What work(rank, *given) returns in each of `size` processes, in the order of their ranks.

    torch.distributed is initialised there, Megatron's groups are not. `work` and what it returns are pickled, so it is
    a module's function. Raises RuntimeError with the first traceback where a process fails or ends early, or all hang.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=_process, args=(end, rank, size, port, seconds, work, given), daemon=True)
        for rank, (_, end) in enumerate(pipes)
    ]
    for process, (_, end) in zip(processes, pipes, strict=True):
        process.start()
        end.close()
    try:
        return _answers([pipe for pipe, _ in pipes], seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answers(pipes: list[Connection], seconds: float) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < len(pipes):
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in answers], timeout=seconds)
        if not ready:
            raise RuntimeError(f"no process of {len(pipes)} said anything for {seconds} s; done: {sorted(answers)}")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                failure, answers[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                failure = "it ended without an answer"
            if failure:
                raise RuntimeError(f"process {rank} of {len(pipes)}: {failure}")
    return [answers[rank] for rank in range(len(pipes))]


def _process(
    end: Connection, rank: int, size: int, port: int, seconds: float, work: Callable[..., Any], given: tuple
) -> None:
    # Where each process stands, before it is taken for hung.
    faulthandler.dump_traceback_later(0.9 * seconds)
    torch.set_num_threads(1)
    # What was imported stays: core collects garbage at each checkpoint, and would go through all of it.
    gc.freeze()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        cpu.install()
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group(backend(), init_method=address, world_size=size, rank=rank)
        answer = (None, work(rank, *given))
        settle()
    except BaseException:
        answer = (traceback.format_exc(), None)
    # Plain pickles: multiprocessing's own would send tensors as handles that end with this process.
    end.send_bytes(pickle.dumps(answer))


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
