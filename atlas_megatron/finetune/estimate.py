"""What a fine-tuning run would take, before anything is written: parameters, tokens, steps, memory by ZeRO stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group
from rich.table import Table

from atlas_kernels.layer_start import weight_shapes
from atlas_megatron.config import WITH_MEMORY, Config, ParallelConfig
from atlas_megatron.estimate.memory import footprint, parameters_at
from atlas_megatron.finetune.plan import Plan

FLOAT = 4  # bytes
LABELS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations, about",
    "memories": "memories, about",
    "total": "in all, about",
}


@dataclass(frozen=True)
class Held:
    """Bytes on a device; the last two are estimates."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    memories: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.memories


def report(run: Plan) -> Group:
    """The run, and what a device holds under each stage."""
    cuts = -(-run.train.longest // run.segment) - 1
    table = Table("what", "value", title=f"dry run: {run.settings.out}")
    table.columns[1].justify = "right"
    steps = run.steps * run.settings.batch
    rows = {
        "parameters": f"{parameters_at(described(run), 0):,}",
        "sequences, their tokens": f"{run.train.sequences:,}, {run.train.tokens:,}",
        "longest sequence": f"{run.train.longest:,} tokens, {cuts:,} cuts",
        "segment": f"{run.segment:,} tokens",
        "gradients": run.gradients,
        "read again in the backward": "yes" if run.checkpointing else "no",
        "steps": f"{run.steps:,} of {run.settings.batch:,} sequences",
        "tokens of the run, about": f"{steps * run.train.tokens // run.train.sequences:,}",
        "micro-batches a step": f"{run.settings.accumulation(run.world_size)}",
        "devices": f"{run.world_size}",
        "precision": "bfloat16, float32 in the optimizer" if run.settings.bf16 else "float32",
    }
    if run.validation:
        rows["validation"] = f"{run.validation.sequences:,} sequences, {run.validation.tokens:,} tokens"
    for name, value in rows.items():
        table.add_row(name, value)
    return Group(table, _stages(run), *_notes(run))


def described(run: Plan) -> Config:
    """The model in the terms of pretraining, on one device, at the length whose activations are held."""
    whole = Config()
    sections: dict[str, Any] = {
        name: replace(getattr(whole, name), **values) for name, values in run.config.sections().items()
    }
    config = replace(whole, **sections, parallel=ParallelConfig())
    alive = run.segment if run.checkpointing else run.window
    return replace(
        config,
        model=replace(config.model, seq_length=alive),
        train=replace(config.train, micro_batch=run.settings.micro_batch, global_batch=run.settings.micro_batch),
    )


def held(run: Plan, stage: int) -> Held:
    """Bytes of a device under ZeRO-`stage`, 0 for none, without offloading.

    ZeRO keeps a float32 copy of its share of the parameters, and the gradients that it has to add up in float32.
    """
    config, own = described(run), parameters_at(described(run), 0)
    size, shared = (2 if run.settings.bf16 else FLOAT), run.world_size
    one = footprint(config, 1, 0, bf16=run.settings.bf16)
    optimizer = (3 if stage else 2) * FLOAT * own
    return Held(
        parameters=own * size / (shared if stage == 3 else 1),
        gradients=own * FLOAT / (shared if stage >= 2 else 1),
        optimizer=optimizer / (shared if stage else 1),
        activations=one.activations,
        memories=one.memory_state + _carried(run, config),
    )


def _carried(run: Plan, config: Config) -> float:
    """The memories at the cuts of a window, which the backward begins each segment from.

    Weights, momentum and anchor of a memory, keys and values of a window; full attention and exponential kernels keep
    all that was read, at every cut.
    """
    cuts = max(0, -(-run.window // run.segment) - 1)
    memory, attention = config.memory, config.attention
    read = cuts * (cuts + 1) / 2 * run.segment  # tokens behind all cuts together
    shapes, size = weight_shapes(memory), 2 if run.settings.bf16 else FLOAT
    if memory.kernel == "lifted":
        remembered = cuts * 3.0 * sum(rows * columns for rows, columns in shapes)
    else:
        remembered = read * sum(rows + columns for rows, columns in shapes)
    keys = 2.0 * attention.heads * attention.head_dim * size
    bytes_ = 0.0
    for symbol in config.model.pattern:
        bytes_ += remembered * memory.heads * FLOAT if symbol in WITH_MEMORY else 0.0
        bytes_ += {"*": cuts * attention.window, "A": cuts * attention.window, "F": read}.get(symbol, 0.0) * keys
    return run.settings.micro_batch * bytes_


def _stages(run: Plan) -> Table:
    chosen = run.deepspeed["zero_optimization"]["stage"] if run.deepspeed else 0
    names = ["no ZeRO", *(f"ZeRO-{stage}" for stage in range(1, 4))]
    names[chosen] += ", chosen"
    title = "a device holds" if run.world_size == 1 else f"each of {run.world_size} devices holds"
    table = Table("part", *names, title=title)
    stages = [held(run, stage) for stage in range(4)]
    for part, label in LABELS.items():
        table.add_row(label, *(_bytes(getattr(found, part)) for found in stages))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.2f} MiB"


def _notes(run: Plan) -> list[str]:
    zero = run.deepspeed["zero_optimization"] if run.deepspeed else {}
    notes = [run.on_length] if run.on_length else []
    if "offload_optimizer" in zero:
        notes.append("offload_optimizer: the optimizer's part lies in the host's memory instead")
    if "offload_param" in zero:
        notes.append("offload_param: so do the parameters, but for those of the layers at work")
    return notes
