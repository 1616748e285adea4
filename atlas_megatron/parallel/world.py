"""The processes of a run: who they are, which groups they form, how they are seeded."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy
import torch
from megatron.core import parallel_state, tensor_parallel

from atlas_megatron.config import Config
from atlas_megatron.config.context_levels import context_levels
from atlas_megatron.config.layers import EXPERTS
from atlas_megatron.parallel import alone, cpu, determinism
from atlas_megatron.parallel.device import backend

# Ends the last line of a run that stopped for what a restart mends: launch/job.sbatch requeues by it.
RESUMES = "start the same command again: it resumes from the newest whole checkpoint"

logger = logging.getLogger(__name__)

# How long a process that lost another one waits for all others to say the same.
ROLL_CALL_SECONDS = 5.0


class LostProcessError(ConnectionError):
    """Another process of the run ended, or did not answer in time."""


def size() -> int:
    """Processes of this run: what torchrun says, else one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process among them."""
    return int(os.environ.get("RANK", "0"))


def join(config: Config) -> None:
    """Join the other processes (or be the only one), form Megatron's groups, seed every generator.

    Raises ValueError where the port at which they meet is taken.
    """
    cpu.install()
    determinism.switch(config)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        # A single process needs no address: its store lives in memory. torchrun gives one in the environment.
        single = size() == 1
        store = torch.distributed.HashStore() if single else None
        chosen = alone.backend() if single and not torch.cuda.is_available() else backend()
        timeout = timedelta(minutes=config.parallel.timeout_minutes)
        with _a_port_in_use_said():
            torch.distributed.init_process_group(chosen, timeout=timeout, store=store, rank=rank(), world_size=size())
    form_groups(config)
    seed(config.run.seed)


@contextmanager
def _a_port_in_use_said() -> Iterator[None]:
    try:
        yield
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ValueError(
            f"port {os.environ.get('MASTER_PORT')} of this machine is in use, where the processes were to meet; set "
            "another MASTER_PORT (torchrun: --master-port), the same for every process"
        ) from error


def form_groups(config: Config) -> None:
    """Megatron's tensor, context, pipeline and data-parallel groups over all processes."""
    parallel = config.parallel
    levels = context_levels(config) if parallel.context > 1 else None
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        # Whole experts: the ranks of a tensor group take other ones, or other tokens.
        expert_tensor_parallel_size=1 if EXPERTS in config.model.pattern else None,
        distributed_timeout_minutes=parallel.timeout_minutes,
        # The ranks that exchange heads, next to each other, and the ranks that hand the memory on between those.
        hierarchical_context_parallel_sizes=list(levels) if levels else None,
    )
    if levels and rank() == 0:
        logger.info(
            "context parallel: each sequence on %d ranks, heads exchanged among %d, memory handed on over %d",
            parallel.context, *levels,
        )  # fmt: skip


def seed(value: int) -> None:
    """Seed Python, numpy, torch and Megatron's streams; all processes draw the same numbers, but for Megatron's
    streams of tensor-parallel shards."""
    random.seed(value)
    numpy.random.seed(value % 2**32)
    torch.manual_seed(value)
    tensor_parallel.model_parallel_cuda_manual_seed(value)


@contextmanager
def own_stream(seed: int, part: str) -> Iterator[None]:
    """Within: torch draws on the CPU from a stream of this seed and part of the model; afterwards where it stood.

    So a part starts from the same numbers on whichever rank it lies, and whatever is drawn before it there.
    """
    digest = hashlib.sha256(f"{seed} {part}".encode()).digest()
    with torch.random.fork_rng(devices=()):
        # torch.manual_seed would seed the GPUs too. The generator takes 32 bits of a seed.
        torch.default_generator.manual_seed(int.from_bytes(digest[:4], "big"))
        yield


@contextmanager
def naming_the_lost(config: Config) -> Iterator[None]:
    """Within: a failed exchange between processes becomes a LostProcessError that names the ones that are gone."""
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no type of their own, only the place in its sources.
        if not isinstance(error, torch.distributed.DistError) and "/gloo/" not in str(error):
            raise
        # torchrun now stops the others, but their last words are still to come.
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        gone = ", ".join(map(str, _not_answering())) or "none; the network between them failed"
        signal.signal(signal.SIGTERM, before)
        raise LostProcessError(
            f"rank {rank()} of {size()} lost the others within parallel.timeout_minutes="
            f"{config.parallel.timeout_minutes:g}; ranks that do not answer: {gone}; look at the end of their logs, "
            f"then {RESUMES}"
        ) from error


def is_first_to_say(line: str) -> bool:
    """Whether no other process of the run has asked this of the same line; True where that cannot be found out."""
    key = f"said/{hashlib.sha256(line.encode(errors='replace')).hexdigest()}"
    try:
        return torch.distributed.distributed_c10d._get_default_store().add(key, 1) == 1
    except (RuntimeError, ValueError):
        return True


def from_first[T](values: list[T]) -> list[T]:
    """The first process's list, in every process; in the only one of a world that is not joined, its own."""
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values, src=0)
    return values


def gathered[T](value: T) -> list[T]:
    """What every process gives, by rank; in a world that is not joined, its own alone."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _not_answering() -> list[int]:
    """The ranks that do not come to a roll call; every process that lost another holds it."""
    missing = [other for other in range(size()) if other != rank()]
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set(f"answers/{rank()}", "here")
        end = time.monotonic() + ROLL_CALL_SECONDS
        while missing and time.monotonic() < end:
            missing = [other for other in missing if not store.check([f"answers/{other}"])]
            time.sleep(0.1)
    except RuntimeError:
        # Without torchrun the store lives in rank 0, and ended with it.
        return [0]
    return missing


def leave() -> None:
    """Undo `join`, so that the process can join another run."""
    if torch.distributed.is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
