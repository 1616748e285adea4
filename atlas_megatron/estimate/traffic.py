"""What one rank sends in one training step, in bytes by kind, from closed forms; and what ranks wait for each other.

Counted is what a rank puts on its links where collectives go round a ring of n ranks: an all-reduce 2 (n-1)/n of its
tensor, an all-gather and a reduce-scatter (n-1)/n of the whole one, an all-to-all (n-1)/n of its tensor, a message all
of it. Left out are scalars (loss, gradient norm, counts of steps), what validation and the measurements of
train.stats_every exchange, and the padding of Megatron's buffers, whose parameters begin at multiples of 64.

Dims: t tokens of a context-parallel shard, H heads of a tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from atlas_megatron.config import LAYERS, Config, layers_of
from atlas_megatron.config.checks import data_parallel_size
from atlas_megatron.config.context_levels import context_levels
from atlas_megatron.config.layers import heads_of
from atlas_megatron.config.scale_checks import forwards_again
from atlas_megatron.estimate.memory import micro_batches, parameters_at, replicated_parameters, stages_at
from atlas_megatron.estimate.optimizer import share_of_update, update_of
from atlas_megatron.mixers import costs_of
from atlas_megatron.mixers.costs import Halo
from atlas_megatron.parallel.scan import slicing


class Kind(StrEnum):
    """What is sent, after the group it stays in."""

    TENSOR_SUM = "tensor: all-reduce"
    TENSOR_GATHER = "tensor: all-gather"
    TENSOR_SCATTER = "tensor: reduce-scatter"
    PIPELINE = "pipeline: messages"
    CONVOLUTION = "context: convolution halo"
    ATTENTION = "context: attention halo"
    HEADS = "context: heads all-to-all"
    STATE = "context: state hand-off"
    GRADIENTS = "data: gradient reduce-scatter"
    PARAMETERS = "data: parameter all-gather"
    GRADIENT_SUM = "data: gradient all-reduce"
    EMBEDDING = "tied embeddings: gradient all-reduce"


@dataclass(frozen=True)
class RankPlace:
    """A rank, as far as its traffic depends on it: its place in the pipeline and in the sequence."""

    pipeline: int = 0
    context: int = 0


# Bytes of one micro-batch's forward, and of its backward.
Traffic = Mapping[Kind, float]
Both = tuple[Traffic, Traffic]
NOTHING: Both = ({}, {})
WIDE = 4  # bytes of what is at least float32: tokens on their way into a memory, and its state
POSITION = 8  # bytes of a token's place in its packed document


def bytes_sent(config: Config, world_size: int, place: RankPlace, *, bf16: bool) -> dict[Kind, float]:
    """Bytes that a rank sends in one step, by kind; without the kinds of which it sends none."""
    size, layers, ends, again = 2 if bf16 else 4, [], [], []
    for number, stage in enumerate(stages_at(config, place.pipeline)):
        ends.append(_stage_ends(config, place.pipeline + number * config.parallel.pipeline, size))
        each = {
            symbol: _together([
                _linears(config, *costs_of(symbol).linears(config), size), _layer_context(config, symbol, place, size)
            ])
            for symbol in set(stage)
        }  # fmt: skip
        layers += [each[symbol] for symbol in stage]
        again += [each[symbol][0] for symbol in forwards_again(config, stage)]
    forward, backward = _together(layers)
    passes = _sum(*_together(ends), forward, *again, backward)
    count = micro_batches(config, world_size)
    step = _sum({kind: count * sent for kind, sent in passes.items()}, _after_backward(config, world_size, place, size))
    return {kind: step[kind] for kind in Kind if step.get(kind)}


def busiest(config: Config, world_size: int, pipeline: int, *, bf16: bool) -> dict[Kind, float]:
    """`bytes_sent` of that context-parallel rank of a pipeline rank that sends most."""
    places = (RankPlace(pipeline, context) for context in range(config.parallel.context))
    return max((bytes_sent(config, world_size, place, bf16=bf16) for place in places), key=lambda t: sum(t.values()))


def _sum(*parts: Traffic) -> dict[Kind, float]:
    return {kind: sum(part.get(kind, 0.0) for part in parts) for kind in Kind}


def _together(parts: list[Both]) -> Both:
    return _sum(*(forward for forward, _ in parts)), _sum(*(backward for _, backward in parts))


def _ring(ranks: int) -> float:
    """The share of a tensor that a rank sends on when it goes round."""
    return (ranks - 1) / ranks


def _shard_tokens(config: Config) -> int:
    """Of one micro-batch, B t."""
    return config.train.micro_batch * config.model.seq_length // config.parallel.context


def _linears(config: Config, columns: int, rows: int, size: int) -> Both:
    """Column-parallel linears that read so many numbers a token, and `rows` row-parallel ones.

    Outputs of the latter are summed in the forward, gradients of the former's inputs in the backward. Under sequence
    parallelism each sum is scattered along T, and the inputs, of which a rank keeps its part, are gathered both times.
    """
    parallel = config.parallel
    sent = _ring(parallel.tensor) * _shard_tokens(config) * size
    inputs, outputs = sent * columns, sent * rows * config.model.hidden_size
    if parallel.tensor == 1:
        return NOTHING
    if not parallel.sequence:
        return {Kind.TENSOR_SUM: 2 * outputs}, {Kind.TENSOR_SUM: 2 * inputs}
    forward = {Kind.TENSOR_GATHER: inputs, Kind.TENSOR_SCATTER: outputs}
    return forward, {Kind.TENSOR_GATHER: inputs + outputs, Kind.TENSOR_SCATTER: inputs}


def _stage_ends(config: Config, stage: int, size: int) -> Both:
    """Where a stage of the pattern begins and ends: the embedding, the logits and their loss, or a neighbour."""
    parallel, hidden = config.parallel, config.model.hidden_size
    tokens, last = _shard_tokens(config), parallel.pipeline * parallel.virtual - 1
    message = {Kind.PIPELINE: float(tokens * hidden * size) / (parallel.tensor if parallel.sequence else 1)}
    ends: list[Both] = [_linears(config, 0, 1, size)] if stage == 0 else [({}, message)]
    if stage < last:
        ends.append((message, {}))
    else:
        # Of each token's logits the largest, the label's, and the sum of the exponentials.
        loss = {Kind.TENSOR_SUM: 2 * _ring(parallel.tensor) * 3 * tokens * 4}
        ends += [_linears(config, hidden, 0, size), (loss, {})]
    return _together(ends)


def _layer_context(config: Config, symbol: str, place: RankPlace, size: int) -> Both:
    """One layer among context-parallel ranks."""
    if config.parallel.context == 1:
        return NOTHING
    parts = [_halo(config, place, halo, size) for halo in costs_of(symbol).halos(config)]
    if LAYERS[symbol].exchanges_heads:
        parts.append(_exchange(config, symbol))
    return _together([*parts, _hand_off(config, symbol, place)])


def _halo(config: Config, place: RankPlace, halo: Halo, size: int) -> Both:
    """A halo's positions to the right; their gradients to the left."""
    ranks, kind = config.parallel.context, Kind(f"context: {halo.of} halo")
    width = config.train.micro_batch * (halo.numbers // config.parallel.tensor) * size
    length = config.model.seq_length // ranks
    needed = (ranks - 1) * length if halo.reach is None else halo.reach
    hops = min(-(-needed // length), ranks - 1)
    lengths = [min(length, needed - hop * length) for hop in range(hops)]
    right, left = lengths[: ranks - 1 - place.context], lengths[: place.context]
    return {kind: float(sum(right) * width)}, {kind: float(sum(left) * width)}


def _exchange(config: Config, symbol: str) -> Both:
    """Sequence shards against shards of the heads, and what a memory answered back; the same of the gradients."""
    near, _ = context_levels(config)
    if near == 1:
        return NOTHING
    sent = _ring(near) * _shard_tokens(config)
    numbers = costs_of(symbol).exchanged_numbers(config)
    exchanged = sent * heads_of(config, symbol) // config.parallel.tensor * numbers * WIDE
    positions = sent * near * POSITION if config.data.packed else 0.0
    return {Kind.HEADS: exchanged + positions}, {Kind.HEADS: exchanged}


def _hand_off(config: Config, symbol: str, place: RankPlace) -> Both:
    """A layer's state to the right neighbour, and its gradient to the left one. Slices together make up the whole."""
    ranks, near = _chain(config, symbol)
    number, batch = place.context // near, config.train.micro_batch
    length = config.model.seq_length // ranks

    def state(border: int) -> float:
        numbers = costs_of(symbol).state_numbers(config, border * length)
        return float(batch * numbers / (config.parallel.tensor * near) * WIDE)

    forward = {Kind.STATE: state(number + 1)} if number < ranks - 1 else {}
    return forward, ({Kind.STATE: state(number)} if number > 0 else {})


def _chain(config: Config, symbol: str) -> tuple[int, int]:
    """(ranks that a layer's state passes, ranks that share each of its places)."""
    if not LAYERS[symbol].exchanges_heads:
        return config.parallel.context, 1
    near, far = context_levels(config)
    return far, near


def _after_backward(config: Config, world_size: int, place: RankPlace, size: int) -> Traffic:
    """Once a step: gradients and parameters of the optimizer, what Muon gathers, and what several ranks hold."""
    parallel, model, train = config.parallel, config.model, config.train
    layers = "".join(stages_at(config, place.pipeline))
    share = _ring(data_parallel_size(config, world_size) * parallel.context) * parameters_at(config, place.pipeline)
    if train.optimizer == "adamw" or train.muon_layer_wise:
        sent = {Kind.GRADIENTS: share * 4, Kind.PARAMETERS: share * size}
    else:
        sent = {Kind.GRADIENT_SUM: 2 * share * 4}
    updates = [update_of(config, symbol, bf16=size == 2) for symbol in layers]
    updated = share_of_update(config, world_size)
    sent[Kind.TENSOR_GATHER] = updated * sum(update.gathered for update in updates)
    sent[Kind.TENSOR_SUM] = updated * sum(update.summed for update in updates)
    last = parallel.pipeline - 1
    if parallel.sequence:
        # Each rank saw other tokens.
        held = sum(replicated_parameters(config, symbol) for symbol in layers)
        held += model.hidden_size if place.pipeline == last else 0
        sent[Kind.TENSOR_SUM] += 2 * _ring(parallel.tensor) * held * 4
    if model.tied_embeddings and last > 0 and place.pipeline in (0, last):
        sent[Kind.EMBEDDING] = 4.0 * model.vocab_size * model.hidden_size / parallel.tensor
    return sent


def pipeline_bubble(config: Config, world_size: int) -> float:
    """The share of a step in which a pipeline rank waits for others: (p-1) / (v m + p-1).

    p ranks of v equal stages each and m micro-batches, 1F1B or interleaved: p-1 stages' passes fill and drain it.
    """
    idle = config.parallel.pipeline - 1
    return idle / (config.parallel.virtual * micro_batches(config, world_size) + idle)


def hand_off_bubble(config: Config) -> float:
    """The share of a pass in which a rank waits for a state, at most, forward and backward alike.

    A chain of c ranks scans a layer in s slices. The left neighbour begins a slice when it is done with the one before,
    so rank r follows it by one slice of one layer, 1/s of a scan. It never catches up and never falls back further:
    nobody waits for the right, and the left neighbour's next layer is under way as long before. So a forward pays
    (c-1)/s scans of its slowest layer, once and not a layer; the backward the same to the left, in its own scans.
    Layers that do not exchange heads do not slice either (s = 1), and pass every rank. Ranks that exchange heads wait
    for each other at each such exchange: there, what the other layers had them follow by is paid again for each.

    Assumed: time goes with matrix-product FLOPs, in the backward in the same proportions; messages take none and wait
    in a queue that is never full; stages are equal; a rank begins each pass with its neighbours, as where passes
    alternate (1F1B); several forwards in a row, as a pipeline's first ones, pay once.
    """
    if config.parallel.context == 1:
        return 0.0
    near, far = context_levels(config)
    follows, again = 0.0, 0.0
    for symbol in layers_of(config):
        scan = costs_of(symbol).scan_flops(config)
        if LAYERS[symbol].exchanges_heads:
            follows = max(follows, (far - 1) * scan / _slices(config, symbol))
        else:
            follows, again = max(follows, (far - 1) * near * scan), again + (near - 1) * scan
    parallel = config.parallel
    stages = parallel.pipeline * parallel.virtual
    waited = follows + again / stages
    work = sum(costs_of(symbol).flops_per_token(config)[0] for symbol in layers_of(config)) / stages
    return waited / (waited + work)


def _slices(config: Config, symbol: str) -> int:
    """Into which batch and heads of one rank are really cut."""
    near, far = context_levels(config)
    heads = heads_of(config, symbol) // (config.parallel.tensor * near)
    batch = config.train.micro_batch
    rows, columns = slicing(batch, heads, config.parallel.context_slices or 2 * far)
    return batch // rows * (heads // columns)
