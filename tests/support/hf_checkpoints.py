"""Checkpoints of small models without a run around them: of one process, and the same in other layouts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.checkpoint.shards import write_shards
from atlas_megatron.config import Config
from atlas_megatron.model.build import build_chunks
from atlas_megatron.parallel import cpu, world
from atlas_megatron.parallel.device import backend


@contextmanager
def one_process() -> Iterator[None]:
    """A world of one, without Megatron's groups."""
    cpu.install()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend(), store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def save(config: Config, folder: Path, start: Path | None = None, dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint of a fresh model in this layout, moved away from its start; or of `start`'s parameters."""
    world.form_groups(config)
    world.seed(1234)
    chunks = build_chunks(config)
    for chunk in chunks:
        chunk.to(dtype)
        if start is not None:
            chunk.load_state_dict(dist_checkpointing.load(chunk.sharded_state_dict(), str(start)))
        else:
            with torch.no_grad():
                for parameter in chunk.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
    if world.rank() == 0:
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    write_shards({f"chunk {n}": chunk.sharded_state_dict() for n, chunk in enumerate(chunks)}, folder)
    if world.rank() == 0:
        checkpoint.complete(folder, config, 0)
    parallel_state.destroy_model_parallel()
    return folder


def save_again(rank: int, layouts: dict[str, Config], start: Path, folder: Path) -> None:
    """In the processes of these layouts: `start`'s parameters as a checkpoint of each."""
    for name, config in layouts.items():
        save(config, folder / name, start)
        torch.distributed.barrier()
