"""What one rank holds in training, in bytes, from closed forms: no process, no model, no tensor.

Of a rank only its pipeline stage matters: tensor, context and data-parallel ranks of a stage hold alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from atlas_kernels.layer_start import gate_count, weight_shapes
from atlas_megatron.config import WITH_MEMORY, Config
from atlas_megatron.config.checks import data_parallel_size
from atlas_megatron.config.context_levels import context_levels
from atlas_megatron.mixers import MIXERS


@dataclass(frozen=True)
class Footprint:
    """Bytes on a device; the first three are exact up to Megatron's padding, the last two estimates."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    memory_state: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.memory_state


def footprint(config: Config, world_size: int, rank: int, *, bf16: bool) -> Footprint:
    """Bytes a device of pipeline rank `rank`; with bf16 the optimizer adds float32 master weights.

    Gradients are kept in float32. The optimizer's state is shared out over data- and context-parallel ranks.
    """
    size, own = 2 if bf16 else 4, parameters_at(config, rank)
    replicas = data_parallel_size(config, world_size)
    passes = _passes_held(config, rank, micro_batches(config, world_size))
    return Footprint(
        parameters=own * size,
        gradients=own * 4,
        optimizer=own * (12 if bf16 else 8) / (replicas * config.parallel.context),
        activations=_activations(config, rank, passes, size),
        memory_state=_memory_state(config, rank, passes),
    )


def fullest(config: Config, world_size: int, *, bf16: bool) -> int:
    """The pipeline rank that holds most."""
    ranks = range(config.parallel.pipeline)
    return max(ranks, key=lambda rank: footprint(config, world_size, rank, bf16=bf16).total)


def micro_batches(config: Config, world_size: int) -> int:
    """Of one step, on each replica."""
    return config.train.global_batch // (config.train.micro_batch * data_parallel_size(config, world_size))


def stages_at(config: Config, rank: int) -> list[str]:
    """The layers of each stage of the pattern that a pipeline rank holds: every `pipeline`-th one."""
    return config.model.pattern.split("|")[rank :: config.parallel.pipeline]


def parameters_at(config: Config, rank: int) -> int:
    """Parameters on one device of a pipeline rank; tied embeddings count on the first and on the last one."""
    model, parallel = config.model, config.parallel
    embedding = model.vocab_size * model.hidden_size // parallel.tensor
    count = sum(_layer_parameters(config, symbol) for stage in stages_at(config, rank) for symbol in stage)
    if rank == 0:
        count += embedding
    if rank == parallel.pipeline - 1:
        count += model.hidden_size
        if parallel.pipeline > 1 or not model.tied_embeddings:
            count += embedding
    return count


def replicated_parameters(config: Config, symbol: str) -> int:
    """Those of one layer that every tensor-parallel rank holds whole: norms, and the gates' way down."""
    hidden, rank = config.model.hidden_size, config.memory.gate_rank
    return hidden + {"M": rank * hidden, "A": (rank + 2) * hidden, "C": (rank + 2) * hidden}.get(symbol, 0)


def _layer_parameters(config: Config, symbol: str) -> int:
    model = config.model
    mixer = MIXERS.get(symbol)
    whole = model.hidden_size + (mixer.num_params(config) if mixer else 3 * model.hidden_size * model.ffn_hidden_size)
    replicated = replicated_parameters(config, symbol)
    return replicated + (whole - replicated) // config.parallel.tensor


def _passes_held(config: Config, rank: int, count: int) -> float:
    """Micro-batches whose activations a pipeline rank holds at once, of all its stages: 1F1B, or interleaved."""
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual
    after = pipeline - rank - 1
    if virtual == 1:
        return min(count, after + 1)
    return min(count * virtual, 2 * after + (virtual - 1) * pipeline + 1) / virtual


def _activations(config: Config, rank: int, passes: float, size: int) -> float:
    """What the backward of so many micro-batches keeps: each layer's inputs and products, and the logits of one.

    With train.recompute only each layer's input stays, and one layer at a time is whole.
    """
    model, parallel = config.model, config.parallel
    layers = "".join(stages_at(config, rank))
    around = 2 * model.hidden_size * size / (parallel.tensor if parallel.sequence else 1)
    inside = {symbol: _inside(config, symbol, size) for symbol in set(layers)}
    if config.train.recompute:
        kept = passes * len(layers) * around / 2 + max(inside.values()) + around
    else:
        kept = passes * sum(inside[symbol] + around for symbol in layers)
    if rank == parallel.pipeline - 1:
        kept += (size + 4 + 4) * model.vocab_size / parallel.tensor
    return config.train.micro_batch * model.seq_length / parallel.context * kept


def _inside(config: Config, symbol: str, size: int) -> float:
    """Bytes a token that a layer keeps besides its input twice (residual and norm), of this rank's heads.

    M: q, k, v before and after the convolution, lifted in float32, gates and the read; *, F: q, k, v and the output,
    and keys and values of what the ranks to the left have; -: both halves of SwiGLU and their product; D, G: as M;
    R, L: the output gate's branch, and in float32 what each token's cell computes, gates and states; A, C: both, C
    with the read besides, and its own keys and values.
    """
    model, memory, delta, tensor = config.model, config.memory, config.delta, config.parallel.tensor
    width, seen = memory.heads * memory.head_dim, config.attention.heads * config.attention.head_dim
    recurrent, dealt = config.recurrent.heads * config.recurrent.head_dim, delta.heads * delta.head_dim
    memory_only = (8 * width * size + (5 * width + 2 * memory.heads * gate_count(memory)) * 4) / tensor
    tokens = model.seq_length / config.parallel.context
    reach = model.seq_length if symbol == "F" else config.attention.window - 1
    left = min(reach, model.seq_length - tokens) / tokens
    attention = (5 if symbol == "C" else 5 + 2 * left) * seen * size / tensor
    joined = memory_only + attention + 2 * model.hidden_size * size
    return {
        "M": memory_only,
        "*": attention,
        "F": attention,
        "-": 3 * model.ffn_hidden_size * size / tensor,
        "R": recurrent * (3 * size + 6 * 4) / tensor,
        "L": recurrent * (3 * size + 7 * 4) / tensor,
        "D": (8 * dealt * size + (5 * dealt + 2 * delta.heads) * 4) / tensor,
        "G": (8 * dealt * size + (5 * dealt + 4 * delta.heads) * 4) / tensor,
        "A": joined,
        "C": joined + (2 * width * 4 + 2 * seen * size) / tensor,
    }[symbol]


def _memory_state(config: Config, rank: int, passes: float) -> float:
    """What the backward of the memories keeps of them, in float32.

    Weights, momentum and anchor at about sqrt(N) of the N chunks that a rank scans; exponential kernels instead: the
    two factors of each write. With train.recompute of one layer at a time.
    """
    model, memory, parallel = config.model, config.memory, config.parallel
    layers = [symbol for stage in stages_at(config, rank) for symbol in stage if symbol in WITH_MEMORY]
    near, shapes, kept = context_levels(config)[0], weight_shapes(memory), []
    for symbol in layers:
        # C hands its memory on and never exchanges heads.
        shared = 1 if symbol == "C" else near
        tokens = model.seq_length * shared // parallel.context
        if memory.kernel == "lifted":
            borders = math.isqrt(max(1, tokens // memory.chunk)) + 1
            numbers = borders * 3.0 * sum(rows * cols for rows, cols in shapes)
        else:
            numbers = tokens * (1 + (memory.window - 1) / memory.chunk) * sum(rows + cols for rows, cols in shapes)
        kept.append(numbers * memory.heads / (parallel.tensor * shared))
    held = max(kept, default=0.0) if config.train.recompute else passes * sum(kept)
    return config.train.micro_batch * held * 4
