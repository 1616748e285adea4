"""What a run would cost, and where it would not fit, from closed forms: no process, no data, no model, no tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Group, RenderableType
from rich.table import Table

from atlas_megatron.config import LAYERS, Config, TrainConfig, layers_of
from atlas_megatron.config.batch_ramp import stages, tokens_of
from atlas_megatron.config.checks import data_parallel_size, validate
from atlas_megatron.config.context_levels import context_levels
from atlas_megatron.estimate.machine import MEMORY, SIZES, Machine
from atlas_megatron.estimate.memory import Footprint, footprint, fullest, micro_batches, parameters_at, stages_at
from atlas_megatron.estimate.optimizer import moved_by_muon, share_of_update, update_of
from atlas_megatron.estimate.plan import PRODUCTS, Planner
from atlas_megatron.estimate.traffic import busiest, hand_off_bubble, pipeline_bubble
from atlas_megatron.model.build import active_params, flops_per_token, num_params

# The share of a step from which on it is said what takes it.
SEEN = 0.001


@dataclass(frozen=True)
class DryRun:
    """A validated configuration on a world of devices with so many bytes each."""

    config: Config
    world_size: int
    memory: float
    bf16: bool
    machine: Machine = Machine(None, MEMORY)  # whose devices the time is estimated for

    def report(self) -> Group:
        """The run and its layout, its fullest rank, all pipeline ranks where they differ, and whether it fits."""
        rank = fullest(self.config, self.world_size, bf16=self.bf16)
        parts: list[RenderableType] = [self._run(), self._rank(rank)]
        if self.config.parallel.pipeline > 1:
            parts.append(self._ranks())
        return Group(*parts, self._time(), *self.verdict())

    def _time(self) -> Table:
        """Tokens a second, hours and cost, by the planner's estimate: what a device is taken to reach is a guess."""
        machine, config = self.machine, self.config
        table = _table("time, estimated from FLOPs and messages")
        who = machine.device or "a GPU whose rate is not known"
        table.add_row("device" if machine.said else "device, assumed: none is seen here", who)
        if machine.flops(bf16=self.bf16) is None:
            return table
        planner = Planner(config, self.world_size, machine, frozenset(), bf16=self.bf16)
        estimate = planner.estimate(config, self.memory)
        seconds, kind = estimate.seconds, "bfloat16" if self.bf16 else "float32"
        table.add_row(f"of its {kind} peak, a guess (mfu=)", f"{machine.mfu:.0%}")
        rate = config.train.global_batch * config.model.seq_length / seconds
        table.add_row("tokens a second, in all", f"{rate:,.0f}")
        table.add_row("seconds a step", f"{seconds:,.3g}")
        for what, spent in estimate.spent.items():
            if what != PRODUCTS and spent > SEEN * seconds:
                table.add_row(f"of these, {what}", f"{spent / seconds:.1%}")
        table.add_row("hours of the run", f"{estimate.hours:,.3g}")
        table.add_row("device hours", f"{estimate.hours * self.world_size:,.3g}")
        if machine.price:
            cost = estimate.hours * self.world_size * machine.price
            table.add_row(f"cost, at {machine.price:g} a device hour", f"{cost:,.3g}")
        return table

    def verdict(self) -> list[str]:
        """Lines: that every rank fits, or which does not, by how much, and what would change that."""
        held = {rank: self._held(rank) for rank in range(self.config.parallel.pipeline)}
        over = {rank: held[rank].total - self.memory for rank in held if held[rank].total > self.memory}
        most, device = max(footprint.total for footprint in held.values()), _bytes(self.memory)
        if not over:
            named = self.machine.said or self.memory != SIZES.get(self.machine.device)
            assumed = "" if named else f" (assumed: {self.machine.device}; memory= or device= says otherwise)"
            return [f"fits: about {_bytes(most)} of the {device} of a device{assumed}"]
        lines = [
            f"does not fit: pipeline rank {rank} needs about {_bytes(held[rank].total)}, {_bytes(excess)} more than "
            f"the {device} of a device; the largest part are {_largest(held[rank])}"
            for rank, excess in over.items()
        ]
        remedies = [
            f"  {words}: about {_bytes(total)}, {'fits' if total <= self.memory else 'still too much'}"
            for words, total in self._remedies()
            if total < most
        ]
        return [*lines, "what would change that:", *remedies, "  more stages: parallel.pipeline, and cuts '|' for it"]

    def _held(self, rank: int) -> Footprint:
        return footprint(self.config, self.world_size, rank, bf16=self.bf16)

    def _remedies(self) -> Iterator[tuple[str, float]]:
        """Single changes that this world allows, and the bytes of the fullest rank with each."""
        train, parallel = self.config.train, self.config.parallel
        changes = {
            "train.recompute_layers=0" if train.recompute_layers else "train.recompute=true": replace(
                self.config, train=replace(train, recompute=True, recompute_layers=0)
            ),
            f"train.micro_batch={train.micro_batch // 2}": replace(
                self.config, train=replace(train, micro_batch=train.micro_batch // 2)
            ),
            "parallel.sequence=true": replace(self.config, parallel=replace(parallel, sequence=True)),
            f"parallel.tensor={2 * parallel.tensor}": replace(
                self.config, parallel=replace(parallel, tensor=2 * parallel.tensor)
            ),
            f"parallel.context={2 * parallel.context}": replace(
                self.config, parallel=replace(parallel, context=2 * parallel.context)
            ),
        }
        for words, config in changes.items():
            try:
                validate(config, self.world_size)
            except ValueError:
                continue
            rank = fullest(config, self.world_size, bf16=self.bf16)
            yield words, footprint(config, self.world_size, rank, bf16=self.bf16).total

    def _run(self) -> Table:
        config, world_size = self.config, self.world_size
        train, model, parallel, flops = config.train, config.model, config.parallel, flops_per_token(config)
        replicas, tokens = data_parallel_size(config, world_size), train.global_batch * model.seq_length
        table = _table(f"dry run: {config.run.directory}")
        table.add_row("parameters", f"{num_params(config):,}")
        if active_params(config) < num_params(config):
            table.add_row("parameters that a token meets", f"{active_params(config):,}")
            table.add_row("experts a device, of each layer", f"{config.experts.count // parallel.expert}")
        counts = [(layer.kind, model.pattern.count(symbol)) for symbol, layer in LAYERS.items()]
        table.add_row("layers", ", ".join(f"{count} {kind}" for kind, count in counts if count))
        table.add_row("forward FLOPs a token", f"{flops.forward:.3e}")
        table.add_row("training FLOPs a token", f"{flops.training:.3e}")
        table.add_row("of these, the memories' inner loop", f"{flops.inner:.3e}")
        table.add_row("tokens a step", f"{tokens:,} ({train.global_batch} sequences of {model.seq_length:,})")
        if train.batch_ramp:
            table.add_row("sequences a step, from which on", _ramp(config))
        table.add_row("tokens of the run", f"{tokens_of(config, train.steps):,} in {train.steps:,} steps")
        table.add_row("learning rate", f"{train.lr:g} after {train.warmup_steps:,} steps")
        table.add_row("learning rate, then", _schedule(train))
        table.add_row("micro-batches a step", f"{micro_batches(config, world_size)}")
        if train.recompute or train.recompute_modules:
            table.add_row("recomputed in the backward", _recomputed(train))
        self._optimizer(table)
        table.add_row("precision", "bfloat16, float32 master weights" if self.bf16 else "float32")
        layout = (parallel.tensor, parallel.pipeline, parallel.context, replicas)
        table.add_row("devices", f"{world_size:,}")
        table.add_row("tensor x pipeline x context x data", " x ".join(map(str, layout)))
        if parallel.pipeline > 1:
            table.add_row("waiting in the pipeline", f"{pipeline_bubble(config, world_size):.1%} of a step")
        if parallel.context > 1:
            near, far = context_levels(config)
            table.add_row("context ranks that exchange heads", f"{near}")
            table.add_row("context ranks that hand states on", f"{far}")
            table.add_row("waiting for states, at most", f"{hand_off_bubble(config):.1%} of a pass")
        return table

    def _optimizer(self, table: Table) -> None:
        """What moves the parameters, and how many of each kind."""
        config, train, layers = self.config, self.config.train, layers_of(self.config)
        if train.optimizer == "adamw":
            table.add_row("optimizer", "AdamW, its states sharded")
            return
        scalar = {"adam": "AdamW", "lion": "Lion"}[train.muon_scalar_optimizer]
        sharded = "its states sharded by matrix" if train.muon_layer_wise else "its states on every replica"
        moved = moved_by_muon(config, layers)
        flops = sum(update_of(config, symbol, bf16=self.bf16).flops for symbol in layers)
        table.add_row("optimizer", f"Muon, {sharded}")
        table.add_row("parameters that Muon moves", f"{moved:,}")
        table.add_row(f"parameters that {scalar} moves", f"{num_params(config) - moved:,}")
        updates = share_of_update(config, self.world_size) * flops / config.parallel.pipeline
        table.add_row("Muon's FLOPs a step and device, mean", f"{updates:.3e}")

    def _rank(self, rank: int) -> Table:
        config, held = self.config, self._held(rank)
        many = config.parallel.pipeline > 1
        table = _table(f"a device of pipeline rank {rank}, the fullest" if many else "a device")
        table.add_row("parameters", f"{parameters_at(config, rank):,}")
        for name, size in vars(held).items():
            table.add_row(f"holds: {_NAMES[name]}", _bytes(size))
        table.add_row("holds: in all, about", _bytes(held.total))
        sent = busiest(config, self.world_size, rank, bf16=self.bf16)
        for kind, size in sent.items():
            table.add_row(f"sends a step, {kind}", _bytes(size))
        if sent:
            table.add_row("sends a step, in all", _bytes(sum(sent.values())))
        return table

    def _ranks(self) -> Table:
        """A row a pipeline rank; neighbours that are alike share one."""
        most = max(self._held(rank).total for rank in range(self.config.parallel.pipeline))
        name, unit, digits = ("GiB", 2**30, 2) if most >= 2**30 else ("MiB", 2**20, 1)
        names = ("layers", "10^6 params", "weights etc.", "activations", "memory states", "in all", "sent")
        title = f"every pipeline rank: {name} held, about, and sent in a step"
        table = Table("rank", *names, title=title, pad_edge=False)
        rows: list[tuple[int, int, tuple[str, ...]]] = []
        for rank in range(self.config.parallel.pipeline):
            row = self._row(rank, unit, digits)
            if rows and rows[-1][2] == row:
                rows[-1] = (rows[-1][0], rank, row)
            else:
                rows.append((rank, rank, row))
        for first, last, row in rows:
            table.add_row(str(first) if first == last else f"{first} to {last}", *row)
        for column in table.columns[2:]:
            column.justify = "right"
            # On a narrow screen it is the layers that wrap.
            column.min_width = max(len(word) for text in (column.header, *column.cells) for word in str(text).split())
        return table

    def _row(self, rank: int, unit: int, digits: int) -> tuple[str, ...]:
        held, layers = self._held(rank), "".join(stages_at(self.config, rank))
        sent = sum(busiest(self.config, self.world_size, rank, bf16=self.bf16).values())
        state = held.parameters + held.gradients + held.optimizer
        return (
            " ".join(f"{layers.count(symbol)}{symbol}" for symbol in LAYERS if symbol in layers),
            f"{parameters_at(self.config, rank) / 1e6:,.2f}",
            *(f"{size / unit:,.{digits}f}" for size in (state, held.activations, held.memory_state, held.total, sent)),
        )


# How a Footprint's fields are called; "about" is an estimate.
_NAMES = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations, about",
    "memory_state": "memory states, about",
}


def _largest(held: Footprint) -> str:
    name = max(vars(held), key=lambda field: getattr(held, field))
    return f"{_NAMES[name].removesuffix(', about')}, {_bytes(getattr(held, name))}"


def _schedule(train: TrainConfig) -> str:
    """What the learning rate does after the warm-up, in words that fit a narrow screen."""
    low = f"{train.min_lr:g}"
    return {
        "cosine": f"a cosine to {low}",
        "wsd": f"{train.decay_shape} from step {train.steps - train.decay_steps:,} to {low}",
        "constant": "constant",
        "inverse_sqrt": f"inverse square root, {low} at least",
    }[train.schedule]


def _recomputed(train: TrainConfig) -> str:
    if train.recompute_modules:
        return f"{', '.join(train.recompute_modules)} of core's layers"
    return f"the first {train.recompute_layers} layers of each stage" if train.recompute_layers else "every layer"


def _ramp(config: Config) -> str:
    return ", ".join(f"{batch:,} from {start:,}" for start, batch in stages(config))


def _table(title: str) -> Table:
    table = Table("what", "value", title=title)
    table.columns[1].justify = "right"
    return table


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.2f} MiB"
