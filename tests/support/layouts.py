"""Layouts of a small model, and what one process of them does, step by step in any dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.transformer import MegatronModule
from torch import Tensor

from atlas_megatron.checkpoint.shards import write_shards
from atlas_megatron.config import (
    AttentionConfig,
    Config,
    DeltaConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    RecurrentConfig,
    TrainConfig,
)
from atlas_megatron.config.checks import validate
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.model.build import build_chunks
from atlas_megatron.parallel import world
from atlas_megatron.training.write_budget import set_budget

LAYERS = 6
SEQUENCES = 4


@dataclass(frozen=True)
class Layout:
    """Processes, how they share the work, and where the pattern's pipeline cuts stand."""

    processes: int
    parallel: ParallelConfig
    cuts: tuple[int, ...] = ()

    def pattern(self, pattern: str) -> str:
        ends = (0, *self.cuts, len(pattern))
        return "|".join(pattern[a:b] for a, b in zip(ends, ends[1:], strict=False))

    def of(self, config: Config) -> Config:
        """`config` in this layout."""
        model = replace(config.model, pattern=self.pattern(config.model.pattern))
        return replace(config, model=model, parallel=self.parallel)

    def words(self, pattern: str) -> list[str]:
        """The same as overrides of a command line."""
        keys = {f"parallel.{f.name}": getattr(self.parallel, f.name) for f in fields(self.parallel)}
        keys["model.pattern"] = self.pattern(pattern)
        return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]


ONE = Layout(1, ParallelConfig())
LAYOUTS = {
    "data": Layout(2, ParallelConfig()),
    "tensor": Layout(2, ParallelConfig(tensor=2)),
    "sequence": Layout(2, ParallelConfig(tensor=2, sequence=True)),
    "pipeline": Layout(2, ParallelConfig(pipeline=2), (3,)),
    "interleaved": Layout(2, ParallelConfig(pipeline=2, virtual=2), (1, 3, 4)),
    "uneven": Layout(2, ParallelConfig(pipeline=2), (1,)),
    "context": Layout(2, ParallelConfig(context=2)),
    "context handoff": Layout(2, ParallelConfig(context=2, context_mode="handoff")),
    "sequence x context": Layout(4, ParallelConfig(tensor=2, sequence=True, context=2, context_mode="handoff")),
    "interleaved x context": Layout(
        4, ParallelConfig(pipeline=2, virtual=2, context=2, context_mode="handoff"), (1, 3, 4)
    ),
    "data x tensor x pipeline": Layout(8, ParallelConfig(tensor=2, pipeline=2), (3,)),
    "tensor x pipeline x context": Layout(8, ParallelConfig(tensor=2, pipeline=2, context=2), (3,)),
}

MEMORY = Config(
    model=ModelConfig(pattern="M-*-M-", hidden_size=32, ffn_hidden_size=48, vocab_size=64, seq_length=32, init_std=0.1),
    memory=MemoryConfig(
        **{**PRESETS["omeganet"], "window": 5, "chunk": 8},
        **{"heads": 4, "head_dim": 8, "expansion": 2, "gate_rank": 6, "write_gate": True},
    ),
    attention=AttentionConfig(heads=4, head_dim=8, window=12),
    train=TrainConfig(
        steps=8, warmup_steps=0, micro_batch=1, global_batch=SEQUENCES, validate_every=0, write_budget=0.5
    ),
)
# MAG, MAC, full attention with persistent tokens, an exponential kernel, an output layer of its own.
HYBRID = replace(
    MEMORY,
    model=replace(MEMORY.model, pattern="A-C-F-", tied_embeddings=False),
    memory=replace(MEMORY.memory, **{**PRESETS["dot"], "window": 5}),
    attention=replace(MEMORY.attention, persistent=2, segment=8),
)
ATLAS = replace(
    MEMORY, memory=replace(MEMORY.memory, **{**PRESETS["atlas"], "window": 5, "ns_period": 4, "ns_step": "sum"})
)
HIERARCHY = replace(
    MEMORY,
    memory=replace(MEMORY.memory, locals=("2/8", "4/16", "2/8"), projection=True, read="chunk"),
)
BASES = {"memory": MEMORY, "hybrid": HYBRID, "atlas": ATLAS, "hierarchy": HIERARCHY}
BASELINES = replace(
    MEMORY,
    model=replace(MEMORY.model, pattern="D-GR-L"),
    delta=DeltaConfig(heads=4, head_dim=8, late_keys=True, open_gate=True, copy_start=True),
    recurrent=RecurrentConfig(heads=4, head_dim=8),
    train=replace(MEMORY.train, write_budget=0.0),
)


def fits(base: str, layout: str) -> bool:
    """Layers that read segment after segment are refused under sequence parallelism, and hand no cache on."""
    return base != "hybrid" or (layout != "sequence" and "context" not in layout)


def save_start(rank: int, configs: dict[str, Config], folder: Path) -> None:
    """A fresh model of each configuration, in one process, as the checkpoint `<name> start`."""
    for name, config in configs.items():
        world.form_groups(config)
        world.seed(1234)
        _save(build_chunks(config), folder / f"{name} start")
        parallel_state.destroy_model_parallel()


def other_starts(rank: int, cases: list[tuple[Config, Path]]) -> list[list[str]]:
    """Of each case, the parameters of this process whose start is not that of a checkpoint, to the bit.

    A case is a configuration, in its layout, and the checkpoint.
    """
    found = []
    for config, start in cases:
        validate(config, torch.distributed.get_world_size())
        world.form_groups(config)
        # Whatever was drawn before, and however a rank's own streams stand.
        torch.manual_seed(rank)
        chunks = build_chunks(config)
        drawn = {name: dict(_copied(chunk)) for name, chunk in _named(chunks).items()}
        loaded = dist_checkpointing.load(_sharded(chunks), str(start))
        assert all(drawn.values())
        found.append([n for name in drawn for n, own in drawn[name].items() if not torch.equal(own, loaded[name][n])])
        parallel_state.destroy_model_parallel()
    return found


def _copied(chunk: MegatronModule) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, parameter.detach().clone()) for name, parameter in chunk.named_parameters())


def step_by_step(
    rank: int, cases: list[tuple[Config, Path, Path]], dtype: torch.dtype, steps: int, disturbed: int = 0
) -> list[list[tuple[float, float]]]:
    """Of each case, loss and gradient norm of steps of AdamW from a checkpoint, a configuration's layout in `dtype`.

    A case is a configuration, the checkpoint to start at, and where a checkpoint of the first step's gradients, in the
    parameters' places, is to go. disturbed: a seed by which half of all parameters are first moved by one rounding.
    """
    return [_steps(*case, dtype, steps, disturbed) for case in cases]


def _steps(
    config: Config, start: Path, gradients: Path, dtype: torch.dtype, steps: int, disturbed: int
) -> list[tuple[float, float]]:
    if dtype == torch.float64:
        VocabParallelCrossEntropy.calculate_logits_max = staticmethod(_logits_in_float64)
    validate(config, torch.distributed.get_world_size())
    world.form_groups(config)
    world.seed(1234)
    chunks = build_chunks(config)
    for chunk in chunks:
        chunk.to(dtype)
        chunk.config.params_dtype = chunk.config.pipeline_dtype = dtype
    loaded = dist_checkpointing.load(_sharded(chunks), str(start))
    for name, chunk in _named(chunks).items():
        chunk.load_state_dict(loaded[name])
        if disturbed:
            _disturb(chunk, disturbed)
    # Buckets and all-reduce as plain as can be: the distributed optimizer is the trainer's, and takes no float64.
    wrapped = [DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
    options = OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.1, clip_grad=0.0, params_dtype=dtype)
    optimizer = get_megatron_optimizer(options, wrapped)
    found = []
    for step in range(steps):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        batches = _batches(config, step)
        set_budget(chunks, config, step + 1, len(batches) * config.model.seq_length)
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(batches) for _ in wrapped],
            model=wrapped,
            num_microbatches=len(batches),
            seq_length=config.model.seq_length,
            micro_batch_size=1,
            forward_only=False,
        )
        finalize_model_grads(wrapped)
        if step == 0:
            _save_gradients(chunks, gradients)
        optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        optimizer.step()
        found.append((_sum(losses), norm))
    parallel_state.destroy_model_parallel()
    return found


def _forward_step(batches: Iterator[dict[str, Tensor]], model: MegatronModule) -> tuple[Tensor, partial]:
    given = next(batches)
    output = model(given["tokens"], None, None, labels=given["labels"])
    return output, partial(_loss, given["whole"])


def _loss(tokens: int, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = losses.sum() / tokens
    return loss, {"loss": loss.detach().clone()}


def _logits_in_float64(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As core's own, which goes on in float32 whatever it is given."""
    copied = logits.double().clone()
    return copied, copied.max(-1)[0]


def _batches(config: Config, step: int) -> list[dict[str, Tensor]]:
    """This process's shard of its replica's share of a step's sequences."""
    generator = torch.Generator().manual_seed(step)
    # Each repeats a phrase: there is something to learn, also at test time.
    phrase = torch.randint(config.model.vocab_size, (SEQUENCES, 11), generator=generator)
    tokens = phrase.repeat(1, 4)[:, : config.model.seq_length + 1]
    own = tokens.chunk(parallel_state.get_data_parallel_world_size())[parallel_state.get_data_parallel_rank()]
    shards, shard = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    cut = [(row[:, :-1].chunk(shards, 1)[shard], row[:, 1:].chunk(shards, 1)[shard]) for row in own.split(1)]
    return [{"tokens": given, "labels": wanted, "whole": config.model.seq_length} for given, wanted in cut]


def _sum(losses: list[dict[str, Tensor]]) -> float:
    """The mean loss of all sequences, on every process."""
    mine = sum((loss["loss"].double() for loss in losses), torch.zeros((), dtype=torch.float64))
    # Every tensor-parallel rank holds the same; the other stages hold none.
    torch.distributed.all_reduce(mine)
    return mine.item() / SEQUENCES / parallel_state.get_tensor_model_parallel_world_size()


def _disturb(chunk: MegatronModule, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in chunk.parameters():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.copy_(torch.where(up, torch.nextafter(parameter, parameter + 1), parameter))


def _named(chunks: list[Any]) -> dict[str, Any]:
    return {f"chunk {place}": chunk for place, chunk in enumerate(chunks)}


def _sharded(chunks: list[Any]) -> dict[str, Any]:
    return {name: chunk.sharded_state_dict() for name, chunk in _named(chunks).items()}


def _save(chunks: list[Any], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    write_shards(_sharded(chunks), folder)


def _save_gradients(chunks: list[Any], folder: Path) -> None:
    kept = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.copy_(parameter.main_grad)
        _save(chunks, folder)
        for parameter, value in zip((p for chunk in chunks for p in chunk.parameters()), kept, strict=True):
            parameter.copy_(value)


def gathered(rank: int, config: Config, folders: list[Path], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """In one process, every parameter's place in each of these checkpoints."""
    world.form_groups(config)
    world.seed(1234)
    (model,) = build_chunks(config)
    model.to(dtype)
    loaded = [dist_checkpointing.load(model.sharded_state_dict(), str(folder)) for folder in folders]
    parallel_state.destroy_model_parallel()
    names = [name for name, _ in model.named_parameters()]
    return [{name: state[name].detach().clone() for name in names} for state in loaded]
