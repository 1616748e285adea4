"""One training step of a small model under several parallel layouts, in two gloo processes: run by test_model.py."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from atlas_megatron.config import AttentionConfig, Config, MemoryConfig, ModelConfig, ParallelConfig
from atlas_megatron.parallel import cpu
from atlas_megatron.presets import PRESETS

SMALL = Config(
    model=ModelConfig(pattern="M-*-M-", hidden_size=32, ffn_hidden_size=48, vocab_size=64, seq_length=32, init_std=0.1),
    memory=MemoryConfig(heads=4, head_dim=8, expansion=2, chunk=8, window=5, ns_period=4, gate_rank=6),
    attention=AttentionConfig(heads=4, head_dim=8, window=12),
)
PIPELINED = replace(SMALL, model=replace(SMALL.model, pattern="M-*|-M-"))
# MAG, MAC, full attention with persistent tokens, an exponential kernel.
HYBRID = replace(
    SMALL,
    model=replace(SMALL.model, pattern="A-C-F-"),
    memory=replace(SMALL.memory, **PRESETS["dot"]),
    attention=replace(SMALL.attention, persistent=2, segment=8),
)
BASES = {"memory": SMALL, "hybrid": HYBRID}
# By name: which base it is a layout of, and the layout.
LAYOUTS = {
    "data": ("memory", SMALL),
    "tensor": ("memory", replace(SMALL, parallel=ParallelConfig(tensor=2))),
    "sequence": ("memory", replace(SMALL, parallel=ParallelConfig(tensor=2, sequence=True))),
    "pipeline": ("memory", replace(PIPELINED, parallel=ParallelConfig(pipeline=2))),
    "hybrid data": ("hybrid", HYBRID),
    "hybrid tensor": ("hybrid", replace(HYBRID, parallel=ParallelConfig(tensor=2))),
}
LEARNING_RATE = 0.5


def initialise(config: Config) -> None:
    """Core's groups and seeds for `config`, in an initialised torch.distributed."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor, pipeline_model_parallel_size=config.parallel.pipeline
    )
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)


def batch(config: Config) -> dict[str, torch.Tensor]:
    """The same two sequences everywhere."""
    tokens = torch.randint(
        config.model.vocab_size, (2, config.model.seq_length + 1), generator=torch.Generator().manual_seed(5)
    )
    return {"tokens": tokens[:, :-1].to(cpu.device()), "labels": tokens[:, 1:].to(cpu.device())}


def load_step_save(config: Config, start: Path, end: Path) -> None:
    """The checkpoint `start`, one step of plain gradient descent, the checkpoint `end`; in float64.

    In float32 the order of a sum shows: Newton-Schulz blows small directions of the momentum up, rounding included.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from atlas_megatron.model import build_model

    model = build_model(
        config,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    model.double()
    model.config.params_dtype = model.config.pipeline_dtype = torch.float64
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(start)))
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    wrapped.zero_grad_buffer()

    def forward_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module):
        given = next(batches)
        output = model(given["tokens"], None, None, labels=given["labels"])
        return output, lambda loss: (loss.mean(), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([batch(config)]),
        model=wrapped,
        num_microbatches=1,
        seq_length=config.model.seq_length,
        micro_batch_size=2,
        forward_only=False,
    )
    finalize_model_grads([wrapped])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(LEARNING_RATE * parameter.main_grad)
    end.mkdir(exist_ok=True)
    dist_checkpointing.save(model.sharded_state_dict(), str(end))


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_layouts(rank: int, folder: Path, port: int) -> None:
    """Process `rank` of two: every layout, from the start of its base to folder/<layout>."""
    torch.set_num_threads(1)
    cpu.install()
    from megatron.core import parallel_state

    torch.distributed.init_process_group(cpu.backend(), init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    for name, (base, config) in LAYOUTS.items():
        initialise(config)
        load_step_save(config, folder / f"{base} start", folder / name)
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
