"""What a configuration would cost, from closed forms: no process, no data, no tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.table import Table

from atlas_megatron.config import LAYERS, WITH_MEMORY, Config, layers_of
from atlas_megatron.config_checks import data_parallel_size
from atlas_megatron.model import flops_per_token, num_params


@dataclass(frozen=True)
class Footprint:
    """Bytes on the fullest device; the first three are exact up to Megatron's padding, the last two estimates."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    memory_state: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.memory_state


def footprint(config: Config, world_size: int, *, bf16: bool) -> Footprint:
    """Bytes a device. Gradients are kept in float32; with bf16 the optimizer adds float32 master weights."""
    parallel = config.parallel
    shard = num_params(config) / (parallel.tensor * parallel.pipeline)
    size = 2 if bf16 else 4
    return Footprint(
        parameters=shard * size,
        gradients=shard * 4,
        optimizer=shard * (12 if bf16 else 8) / data_parallel_size(config, world_size),
        activations=_activations(config, size),
        memory_state=_memory_state(config),
    )


def _activations(config: Config, size: int) -> float:
    """What the backward of one micro-batch keeps: each layer's inputs and products, and the logits.

    A layer is counted as: its input twice (residual and norm), then M: q, k, v before and after the convolution,
    lifted in float32, gates and the read; *: q, k, v and the output; -: both halves of SwiGLU and their product;
    D, G: as M; R, L: the output gate's branch, and in float32 what each token's cell computes, gates and states.
    With train.recompute only each layer's input stays, and one layer at a time is whole.
    """
    model, memory, tensor = config.model, config.memory, config.parallel.tensor
    tokens = config.train.micro_batch * model.seq_length
    width, gates = memory.heads * memory.head_dim, memory.heads * (3 + _gammas(config))
    inside = {
        "M": (2 * 4 * width * size + (5 * width + 2 * gates) * 4) / tensor,
        "F": 5 * config.attention.heads * config.attention.head_dim * size / tensor,
        "*": 5 * config.attention.heads * config.attention.head_dim * size / tensor,
        "-": 3 * model.ffn_hidden_size * size / tensor,
    }
    recurrent, delta = config.recurrent.heads * config.recurrent.head_dim, config.delta.heads * config.delta.head_dim
    inside["R"] = recurrent * (3 * size + 6 * 4) / tensor
    inside["L"] = recurrent * (3 * size + 7 * 4) / tensor
    inside["D"] = (2 * 4 * delta * size + (5 * delta + 2 * config.delta.heads) * 4) / tensor
    inside["G"] = inside["D"] + 2 * config.delta.heads * 4 / tensor
    inside["A"] = inside["M"] + inside["*"] + 2 * model.hidden_size * size
    # C: the read besides, with its own keys and values.
    inside["C"] = inside["A"] + (2 * width * 4 + 2 * config.attention.heads * config.attention.head_dim * size) / tensor
    around = 2 * model.hidden_size * size / (tensor if config.parallel.sequence else 1)
    # 1F1B: the first stage holds as many micro-batches as there are stages, each with one stage's layers.
    layers = layers_of(config)
    if config.train.recompute:
        kept = len(layers) * around / 2 + max(inside[symbol] for symbol in layers) + around
    else:
        kept = sum(inside[symbol] + around for symbol in layers)
    logits = (size + 4 + 4) * model.vocab_size / tensor
    return tokens * (kept + logits)


def _gammas(config: Config) -> int:
    return config.memory.window if config.memory.omega_gates == "pair" else 1


def _memory_state(config: Config) -> float:
    """Weights, momentum and anchor of each memory, kept at about sqrt(N) of a sequence's N chunks, in float32."""
    model, memory = config.model, config.memory
    value = memory.head_dim
    matrices = value * value if memory.memory == "linear" else 2 * value * memory.expansion * value
    stages = model.pattern.split("|")
    borders = math.isqrt(model.seq_length // memory.chunk) + 1
    ranks = (stages[rank :: config.parallel.pipeline] for rank in range(config.parallel.pipeline))
    layers = max(sum(symbol in WITH_MEMORY for stage in own for symbol in stage) for own in ranks)
    heads = memory.heads / config.parallel.tensor
    return layers * borders * config.train.micro_batch * heads * 3 * matrices * 4


def report(config: Config, world_size: int, *, bf16: bool) -> Table:
    """Parameters, FLOPs, memory a device, batch and layout of a configuration."""
    train, model, parallel = config.train, config.model, config.parallel
    flops, memory = flops_per_token(config), footprint(config, world_size, bf16=bf16)
    replicas = data_parallel_size(config, world_size)
    tokens = train.global_batch * model.seq_length
    table = Table("what", "value", title=f"dry run: {config.run.directory}")
    table.columns[1].justify = "right"
    table.add_row("parameters", f"{num_params(config):,}")
    counts = [(kind, model.pattern.count(symbol)) for symbol, kind in LAYERS.items()]
    table.add_row("layers", ", ".join(f"{count} {kind}" for kind, count in counts if count))
    table.add_row("forward FLOPs a token", f"{flops.forward:.3e}")
    table.add_row("training FLOPs a token", f"{flops.training:.3e}")
    table.add_row("of these, the memories' inner loop", f"{flops.inner:.3e}")
    table.add_row("tokens a step", f"{tokens:,} ({train.global_batch} sequences of {model.seq_length:,})")
    table.add_row("tokens of the run", f"{tokens * train.steps:,} in {train.steps:,} steps")
    table.add_row("micro-batches a step", f"{train.global_batch // (train.micro_batch * replicas)}")
    table.add_row("devices", f"{world_size}: tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {replicas}")
    table.add_row("precision", "bfloat16, float32 master weights" if bf16 else "float32")
    for name, size in (
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations, about", memory.activations),
        ("memory states, about", memory.memory_state),
        ("in all, about", memory.total),
    ):
        table.add_row(f"a device holds: {name}", f"{size / 2**30:.2f} GiB")
    return table
