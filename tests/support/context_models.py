"""Small models under context parallelism, run in several processes by test_context.py: losses and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from atlas_megatron.config import (
    AttentionConfig,
    Config,
    DeltaConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    RecurrentConfig,
)
from atlas_megatron.config.checks import validate
from atlas_megatron.config.context_levels import context_levels
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.mixers.base import Documents
from atlas_megatron.mixers.stream import StreamContext
from atlas_megatron.model.build import build_model
from atlas_megatron.parallel import world
from atlas_megatron.parallel.context import settle

TOKENS, BATCH = 48, 2
SMALL = Config(
    model=ModelConfig(
        pattern="M-*-", hidden_size=32, ffn_hidden_size=48, vocab_size=64, seq_length=TOKENS, init_std=0.1
    ),
    memory=MemoryConfig(heads=4, head_dim=8, expansion=2, chunk=8, window=5, ns_period=4, gate_rank=6),
    attention=AttentionConfig(heads=4, head_dim=8, window=30, segment=12),
    recurrent=RecurrentConfig(heads=4, head_dim=8),
    delta=DeltaConfig(heads=4, head_dim=8),
)


def small(pattern: str = "M-*-", preset: str = "atlas", **memory: Any) -> Config:
    """A model of these layers; memory: further keys of its section."""
    own = {"ns_period": 4} if preset == "atlas" else {}
    chunk = PRESETS[preset].get("chunk", SMALL.memory.chunk)
    kept = {**PRESETS[preset], "chunk": min(chunk, 8), **own, **memory}
    kept["window"] = min(kept.get("window", SMALL.memory.window), SMALL.memory.window)
    return replace(
        SMALL, model=replace(SMALL.model, pattern=pattern), memory=replace(SMALL.memory, preset=preset, **kept)
    )


def spread(config: Config, context: int, mode: str = "auto", **parallel: Any) -> Config:
    return replace(config, parallel=ParallelConfig(context=context, context_mode=mode, **parallel))


def batch(config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels, and positions of packed documents, [BATCH, TOKENS] each."""
    drawn = torch.randint(
        config.model.vocab_size, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(5)
    )
    borders = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    for row, starts in enumerate(((0, 9, 10, 24, 31), (0, 30))):
        borders[row, list(starts)] = True
    place = torch.arange(TOKENS).expand(BATCH, -1)
    positions = place - torch.where(borders, place, 0).cummax(1).values
    return drawn[:, :-1], drawn[:, 1:], positions


_formed: list[tuple[int, int]] = []


def form_groups(config: Config) -> None:
    """Those of the configuration, unless they are there: to form them takes longer than a case."""
    levels = context_levels(config)
    if _formed != [levels]:
        parallel_state.destroy_model_parallel()
        world.form_groups(config)
        _formed[:] = [levels]


def losses_and_gradients(rank: int, cases: list[Config]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Of each case, in float64: losses of all tokens [BATCH, TOKENS], and every gradient of their mean."""
    return [_of_one(config) for config in cases]


def _of_one(config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    validate(config, torch.distributed.get_world_size())
    form_groups(config)
    world.seed(7)
    model = build_model(config).double()
    model.config.params_dtype = torch.float64
    shards, shard = config.parallel.context, parallel_state.get_context_parallel_rank()
    tokens, labels, positions = (t.chunk(shards, 1)[shard] for t in batch(config))
    documents = Documents(positions) if config.data.packed else None
    losses = model(tokens, None, None, labels=labels, packed_seq_params=documents)
    (losses.sum() / (BATCH * TOKENS)).backward()
    group = parallel_state.get_context_parallel_group()
    gathered = [torch.empty_like(losses) for _ in range(shards)]
    torch.distributed.all_gather(gathered, losses.detach(), group=group)
    gradients = _summed_gradients(model, group)
    return torch.cat(gathered, 1), gradients


def _summed_gradients(model: torch.nn.Module, group: torch.distributed.ProcessGroup) -> dict[str, Tensor]:
    """Of each parameter, over the ranks that hold a sequence; each rank must have one."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.distributed.all_reduce(parameter.grad, group=group)
        gradients[name] = parameter.grad
    settle()
    return gradients


PIECES = (16, 32)


def streamed(rank: int, cases: list[Config]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Of each case, in float64: the logits of a sequence read in PIECES, and the gradients of a loss over them."""
    return [_streamed(config) for config in cases]


def _streamed(config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    form_groups(config)
    world.seed(7)
    # Whole segments on each rank of every piece.
    model = build_model(replace(config, attention=replace(config.attention, segment=4))).double()
    model.config.params_dtype = torch.float64
    shards, shard = config.parallel.context, parallel_state.get_context_parallel_rank()
    group = parallel_state.get_context_parallel_group()
    context, read, loss = StreamContext(), [], torch.zeros((), dtype=torch.float64)
    for piece in batch(config)[0].split(PIECES, 1):
        logits = model(piece.chunk(shards, 1)[shard], None, None, inference_context=context)
        gathered = [torch.empty_like(logits) for _ in range(shards)]
        torch.distributed.all_gather(gathered, logits.detach(), group=group)
        read += gathered
        loss = loss + logits.square().mean() / shards
    loss.backward()
    gradients = _summed_gradients(model, group)
    return torch.cat(read, 1), gradients


def refusal_of_a_stream(rank: int, config: Config) -> str:
    """What a rank says to a sequence, read as one piece, whose tokens a rank do not fit the memory."""
    form_groups(config)
    model = build_model(config)
    shards, shard = config.parallel.context, parallel_state.get_context_parallel_rank()
    tokens = batch(config)[0].chunk(shards, 1)[shard]
    try:
        with torch.no_grad():
            model(tokens, None, None, inference_context=StreamContext())
    except ValueError as error:
        return str(error)
    return "nothing"
