"""What one rank holds in training, in bytes, from closed forms: no process, no model, no tensor.

Of a rank only its pipeline stage matters: tensor, context and data-parallel ranks of a stage hold alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from atlas_megatron.config import LAYERS, Config
from atlas_megatron.config.checks import data_parallel_size
from atlas_megatron.config.context_levels import context_levels
from atlas_megatron.config.layers import CUT
from atlas_megatron.config.scale_checks import MODULES, recomputed_layers
from atlas_megatron.estimate.optimizer import state_bytes
from atlas_megatron.mixers import costs_of


@dataclass(frozen=True)
class Footprint:
    """Bytes on a device; the first three are exact up to Megatron's padding (a layer-wise Muon's states in the mean),
    the last two estimates."""

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

    Gradients are kept in float32. The optimizer's state is shared out over data- and context-parallel ranks, but for a
    Muon without train.muon_layer_wise.
    """
    layers = "".join(stages_at(config, rank))
    size, own = 2 if bf16 else 4, parameters_at(config, rank)
    passes = _passes_held(config, rank, micro_batches(config, world_size))
    return Footprint(
        parameters=own * size,
        gradients=own * 4,
        optimizer=state_bytes(config, world_size, own, layers, bf16=bf16),
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
    """Those of one layer that every tensor-parallel rank holds whole: the norm before it, and what its class says."""
    return config.model.hidden_size + costs_of(symbol).replicated_params(config)


def _layer_parameters(config: Config, symbol: str) -> int:
    whole = config.model.hidden_size + costs_of(symbol).num_params(config)
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

    A layer's input counts twice, for the residual and for the norm. Of a layer that is recomputed only the input stays,
    of one whose parts are what is not theirs; and one layer at a time is whole.
    """
    model, parallel = config.model, config.parallel
    around = 2 * model.hidden_size * size / (parallel.tensor if parallel.sequence else 1)
    inside = {symbol: costs_of(symbol).activation_bytes(config, size) for symbol in set(config.model.pattern) - {CUT}}
    kept, again = 0.0, 0.0
    for stage in stages_at(config, rank):
        first = recomputed_layers(config, stage)
        for place, symbol in enumerate(stage):
            whole = inside[symbol] + around
            stays = around / 2 if place < first else whole - _parts_recomputed(config, symbol, inside[symbol], around)
            kept, again = kept + passes * stays, max(again, whole - stays + (around / 2 if place < first else 0.0))
    kept += again
    if rank == parallel.pipeline - 1:
        kept += (size + 4 + 4) * model.vocab_size / parallel.tensor
    return config.train.micro_batch * model.seq_length / parallel.context * kept


def _parts_recomputed(config: Config, symbol: str, inside: float, around: float) -> float:
    """Bytes of a token that train.recompute_modules leaves out of a layer."""
    parts = {"mlp": inside, "layernorm": around / 2}
    return sum(parts[name] for name in config.train.recompute_modules if symbol in MODULES[name])


def _memory_state(config: Config, rank: int, passes: float) -> float:
    """What the backward of the memories keeps of them, in float32; of layers that are recomputed, one at a time."""
    parallel, near, kept, again = config.parallel, context_levels(config)[0], 0.0, 0.0
    for stage in stages_at(config, rank):
        first = recomputed_layers(config, stage)
        for place, symbol in enumerate(stage):
            shared = near if LAYERS[symbol].exchanges_heads else 1
            tokens = config.model.seq_length * shared // parallel.context
            numbers = costs_of(symbol).kept_numbers(config, tokens) / (parallel.tensor * shared)
            kept, again = (kept, max(again, numbers)) if place < first else (kept + passes * numbers, again)
    return config.train.micro_batch * (kept + again) * 4
