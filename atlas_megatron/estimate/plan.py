"""Layouts of a run on so many devices, ranked by an estimated time a step; every figure is an estimate.

A step of a rank takes, with m micro-batches of f FLOPs each (the rank of most FLOPs) at a rate r that is a guess:

    m f / r                    its products; of layers that are recomputed a forward more
    x 1 / (1 - bubble)         of the pipeline, and likewise of states that are handed on
    + u / r                    Muon's Newton-Schulz, once
    + bytes / link             of every message but the gradients', which go beside the last micro-batch's backward

A group's link is that between devices of a node where it fits into one, else a device's network adapter. Left out:
latencies, kernels that are less well used by smaller shards, and other jobs on the same network.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from atlas_megatron.config import Config, layers_of
from atlas_megatron.config.batch_ramp import tokens_of
from atlas_megatron.config.checks import data_parallel_size, validate
from atlas_megatron.config.layers import CUT, EXPERTS
from atlas_megatron.config.scale_checks import forwards_again
from atlas_megatron.config.toml import cut_evenly
from atlas_megatron.estimate.machine import DEVICES_PER_NODE, Machine
from atlas_megatron.estimate.memory import footprint, fullest, micro_batches, stages_at
from atlas_megatron.estimate.optimizer import share_of_update, update_of
from atlas_megatron.estimate.traffic import Kind, RankPlace, bytes_sent, hand_off_bubble, pipeline_bubble
from atlas_megatron.mixers import costs_of
from atlas_megatron.model.build import flops_per_token

# What the planner chooses, but for those that the command line gives.
CHOSEN = (
    *("parallel.tensor", "parallel.sequence", "parallel.pipeline", "parallel.virtual", "parallel.context"),
    "parallel.expert",
    *("train.micro_batch", "train.recompute", "train.recompute_layers"),
)
Sizes = tuple[int, int, int, int]  # tensor, pipeline, context, data
VIRTUAL = (1, 2, 4, 8)
PRODUCTS, PIPELINE, STATES = "products", "waiting in the pipeline", "waiting for states"
# Reduced while the backward of the last micro-batch still runs.
BESIDE = (Kind.GRADIENTS, Kind.GRADIENT_SUM, Kind.EXPERT_GRADIENTS)


@dataclass(frozen=True)
class Estimate:
    """What a layout would take; seconds are of one step, by what they are spent on."""

    config: Config
    sizes: Sizes
    memory: float  # bytes of the fullest rank
    sent: float  # bytes a step of the busiest rank
    spent: dict[str, float]
    mfu: float  # model FLOPs a second, of the device's peak

    @property
    def seconds(self) -> float:
        return sum(self.spent.values())

    @property
    def hours(self) -> float:
        """Of the whole run."""
        config = self.config
        tokens = tokens_of(config, config.train.steps)
        return tokens / (config.train.global_batch * config.model.seq_length) * self.seconds / 3600

    @property
    def waiting(self) -> float:
        """The share of a step in which a rank waits for another stage, or for a state."""
        return (self.spent[PIPELINE] + self.spent[STATES]) / self.seconds


@dataclass(frozen=True)
class FallenOut:
    """A layout that cannot be, and why."""

    sizes: Sizes
    why: str
    memory: float = 0.0  # bytes of the fullest rank, where that is what is wrong


@dataclass(frozen=True)
class Plan:
    """All layouts of so many devices: those that fit, the fastest first, and the others."""

    fitting: list[Estimate]
    others: list[FallenOut]


class Planner:
    """Estimates of one configuration's layouts on `world_size` devices."""

    def __init__(self, config: Config, world_size: int, machine: Machine, held: frozenset[str], *, bf16: bool) -> None:
        """held: keys of CHOSEN that stay as `config` has them. Raises ValueError where a device's rate is not known."""
        rate = machine.flops(bf16=bf16)
        if rate is None:
            raise ValueError("the rate of this machine's GPU is not known; name a device, for example device=H100")
        self.config, self.world_size, self.machine, self.held = config, world_size, machine, held
        self.rate, self.bf16, self.model = rate, bf16, flops_per_token(config)
        # None of them depends on the layout.
        self.forward = {symbol: costs_of(symbol).flops_per_token(config)[0] for symbol in set(layers_of(config))}

    def plan(self) -> Plan:
        """Every layout of the devices, each with its best micro-batch, interleaving and recomputation."""
        fitting, others = [], []
        for sizes in layouts(self.world_size):
            found = self._best(sizes)
            if isinstance(found, Estimate):
                fitting.append(found)
            elif found:
                others.append(found)
        # Alike to three digits: the larger micro-batch, whose kernels are no worse, then what splits less.
        fitting.sort(key=lambda one: (float(f"{one.seconds:.3g}"), -one.config.train.micro_batch, one.sizes))
        return Plan(fitting, others)

    def _best(self, sizes: Sizes) -> Estimate | FallenOut | None:
        """The fastest variant of a layout that fits, or why there is none; None where a key that is held says another.

        Sequence parallelism and recomputation, which cost time, are taken only where memory does not suffice.
        """
        best: Estimate | None = None
        least, refused = 0.0, ""
        for variants in _variants(self.config, sizes, self.held):
            for variant in variants:
                try:
                    _check_stages(variant)
                    validate(variant, self.world_size)
                except ValueError as error:
                    refused = refused or str(error)
                    continue
                memory = footprint(
                    variant, self.world_size, fullest(variant, self.world_size, bf16=self.bf16), bf16=self.bf16
                ).total
                if memory <= self.machine.memory:
                    found = self.estimate(variant, memory)
                    # The larger micro-batch came first.
                    best = found if best is None or found.seconds < 0.999 * best.seconds else best
                    break
                least = min(least or memory, memory)
            # Without a pipeline a smaller micro-batch saves memory alone.
            lean = best and (best.config.train.recompute or best.config.parallel.sequence)
            if best and sizes[1] == 1 and not lean and EXPERTS not in self.config.model.pattern:
                break
        if best:
            return best
        if least:
            return FallenOut(sizes, "memory", least)
        return FallenOut(sizes, refused) if refused else None

    def estimate(self, config: Config, memory: float) -> Estimate:
        """The time of one step of a validated layout. memory: bytes of its fullest rank."""
        parallel, model, ranks = config.parallel, self.model, range(config.parallel.pipeline)
        count = micro_batches(config, self.world_size)
        tokens = config.train.micro_batch * config.model.seq_length / (parallel.tensor * parallel.context)
        # The part of the model that the rank of most FLOPs has.
        longest = max(self._forward(config, rank) for rank in ranks) / model.forward
        products = count * tokens * model.training * longest / self.rate
        even = products / longest / parallel.pipeline
        again = count * tokens * max(self._again(config, rank) for rank in ranks) / self.rate
        bubble = pipeline_bubble(config, self.world_size) if parallel.pipeline > 1 else 0.0
        worked = products + again
        piped = worked / (1 - bubble)
        sent = max((self._sent(config, rank) for rank in {0, ranks[-1]}), key=lambda traffic: sum(traffic.values()))
        seconds = {kind: size / self._link(config, kind) for kind, size in sent.items()}
        beside = sum(seconds[kind] for kind in BESIDE if kind in seconds)
        spent = {
            PRODUCTS: even,
            "uneven stages": products - even,
            "recomputation": again,
            PIPELINE: piped - worked,
            STATES: piped / (1 - hand_off_bubble(config)) - piped,
            "Muon's products": self._update(config) / self.rate,
            "messages": sum(seconds.values()) - beside + max(0.0, beside - products / count * 2 / 3),
        }
        useful = model.training * config.train.global_batch * config.model.seq_length
        mfu = useful / (sum(spent.values()) * self.world_size * self.rate / self.machine.mfu)
        sizes = (parallel.tensor, parallel.pipeline, parallel.context, data_parallel_size(config, self.world_size))
        return Estimate(config, sizes, memory, sum(sent.values()), spent, mfu)

    def _forward(self, config: Config, rank: int) -> float:
        """Forward FLOPs a token of a pipeline rank's layers; the last one has the logits."""
        logits = 2.0 * config.model.hidden_size * config.model.vocab_size
        layers = sum(self.forward[symbol] for stage in stages_at(config, rank) for symbol in stage)
        return layers + (logits if rank == config.parallel.pipeline - 1 else 0.0)

    def _again(self, config: Config, rank: int) -> float:
        """Forward FLOPs a token that a pipeline rank's backward computes a second time."""
        stages = stages_at(config, rank)
        return sum(self.forward[symbol] for stage in stages for symbol in forwards_again(config, stage))

    def _update(self, config: Config) -> float:
        """FLOPs of Newton-Schulz of the rank that has most."""
        if config.train.optimizer != "muon":
            return 0.0
        of = {symbol: update_of(config, symbol, bf16=self.bf16).flops for symbol in self.forward}
        ranks = range(config.parallel.pipeline)
        most = max(sum(of[symbol] for stage in stages_at(config, rank) for symbol in stage) for rank in ranks)
        return share_of_update(config, self.world_size) * most

    def _sent(self, config: Config, rank: int) -> dict[Kind, float]:
        # An inner rank of a context sends to both sides.
        place = RankPlace(rank, config.parallel.context // 2)
        return bytes_sent(config, self.world_size, place, bf16=self.bf16)

    def _link(self, config: Config, kind: Kind) -> float:
        """Bytes a second of the slowest link of the group that a kind goes through, one way.

        Ranks are numbered tensor first, then context, data and pipeline: a group spans all ranks up to its last one.
        """
        parallel, links, group = config.parallel, self.machine.links(), str(kind).partition(":")[0]
        span = {
            "tensor": parallel.tensor,
            "context": parallel.tensor * parallel.context,
            "experts": parallel.expert,
            "data": self.world_size // parallel.pipeline,
        }.get(group, self.world_size)
        return links.inside if span <= (parallel.devices_per_node or DEVICES_PER_NODE) else links.between


def layouts(world_size: int) -> Iterator[Sizes]:
    """Of so many devices."""
    for tensor in _divisors(world_size):
        for pipeline in _divisors(world_size // tensor):
            for context in _divisors(world_size // tensor // pipeline):
                yield tensor, pipeline, context, world_size // tensor // pipeline // context


def _check_stages(config: Config) -> None:
    wanted = config.parallel.pipeline * config.parallel.virtual
    if config.model.pattern.count("|") + 1 < wanted:
        raise ValueError(f"parallel.pipeline={config.parallel.pipeline} is more stages than model.pattern has blocks")


def _variants(config: Config, sizes: Sizes, held: frozenset[str]) -> Iterator[list[Config]]:
    """Of a layout, for each interleaving, micro-batch and number of ranks that share experts out, the larger batch
    first: variants that hold less and take longer."""
    tensor, pipeline, context, data = sizes
    shares = _divisors(tensor * context * data) if EXPERTS in config.model.pattern else [1]
    pattern, own = layers_of(config), config.model.pattern.count("|") + 1
    batches = [config.train.micro_batch >> halved for halved in range(config.train.micro_batch.bit_length())]
    for virtual in VIRTUAL if pipeline > 1 else (1,):
        stages = pipeline * virtual
        cut = config.model.pattern if own == stages else cut_evenly(pattern, stages)
        if virtual > 1 and cut.count("|") + 1 != stages:
            break
        model = replace(config.model, pattern=cut)
        shape = replace(config.parallel, tensor=tensor, pipeline=pipeline, virtual=virtual, context=context)
        for batch, expert in itertools.product(batches, shares):
            changed = [
                replace(
                    config,
                    model=model,
                    train=replace(config.train, micro_batch=batch, **recompute),
                    parallel=replace(shape, sequence=sequence, expert=expert),
                )
                for recompute in _recomputations(cut)
                for sequence in ((False, True) if tensor > 1 else (False,))
            ]
            yield [one for one in changed if all(value_of(one, name) == value_of(config, name) for name in held)]


def _recomputations(pattern: str) -> list[dict[str, Any]]:
    """Values of train.recompute and train.recompute_layers, the least recomputation first: none, quarters, all."""
    longest = max(map(len, pattern.split(CUT)))
    some = sorted({longest * quarters // 4 for quarters in (1, 2, 3)} - {0})
    counted = [{"recompute": True, "recompute_layers": layers} for layers in (*some, 0)]
    return [{"recompute": False, "recompute_layers": 0}, *counted]


def value_of(config: Config, name: str) -> object:
    """A key's value, by its section and name."""
    section, key = name.split(".")
    return getattr(getattr(config, section), key)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
