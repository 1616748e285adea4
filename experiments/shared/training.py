"""Small models of each sequence mixer, and the plain loop that trains and measures one on a generated task."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atlas_megatron.config import (
    AttentionConfig,
    Config,
    DeltaConfig,
    MemoryConfig,
    ModelConfig,
    TrainConfig,
    layers_of,
    uses,
)
from atlas_megatron.config.checks import validate
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.evaluate.synthetic import NO_ANSWER, Batch, Task
from atlas_megatron.mixers import costs_of
from atlas_megatron.model.build import build_model, num_params
from atlas_megatron.parallel import world
from atlas_megatron.parallel.device import device

HIDDEN = 64
FEED_FORWARD = 128
LAYERS = 2
HEADS = 2  # of a memory; attention divides HIDDEN among as many
INIT_STD = HIDDEN**-0.5  # linears of 64 inputs keep their scale
# Zoology's. Output layers are tied: longer embeddings begin by answering every token with itself.
EMBEDDING_STD = 0.02
WINDOW, CHUNK = 8, 16  # of the memories that have them
# Tokens between orthogonalised writes. A memory that wrote once a chunk could not recall what the chunk holds; the
# first place where 2 can be late is the second token of a pair, and pairs of two tokens end where a write is.
NS_PERIOD = 2
# Steps start about ten times larger than the default. Their bound is as much higher, because steps end up at the
# default's bound. ORTHOGONAL: the step of an orthogonalised write. Of 16 pairs ATLAS answers 52 % with 0.02, the
# default for this period. It answers 83 % with 0.15, and 60 % with 0.4 (heads of 16, rate 0.01, one seed, keys as
# drawn).
ETA_SUM, ORTHOGONAL = 1.0, 0.15
# Of ATLAS, at the start. It was the default when the runs of mad.py were made.
RETENTION = 0.99
GATE_RANK = 8
# What a Gated DeltaNet's keys, output gate and values start with in `our starts`: as the memories' do.
STARTS = ("late_keys", "open_gate", "copy_start")
OUR_STARTS = dict.fromkeys(STARTS, True)
# A suffix of a mixer's name changes keys of its section: [memory], or [delta] for Gated DeltaNet.
VARIANTS: dict[str, dict[str, Any]] = {
    ", damped": {"anchor_gradient": 0.3},
    ", first order": {"anchor_gradient": 0.0},
    ", starts as drawn": dict.fromkeys(STARTS, False),
    ", our starts": OUR_STARTS,
    ", a write every 8": {"ns_period": 8},
}
# What each mixer is: a symbol of `model.pattern` and the memory's preset.
SYMBOLS = {
    "atlas": ("M", "atlas"),
    "omeganet": ("M", "omeganet"),
    "titans": ("M", "titans"),
    "delta": ("M", "delta"),
    "gated delta": ("G", ""),
    "sliding window": ("*", ""),
    "attention": ("F", ""),
}
# Batches of evaluation come from seeds that no training step reaches.
EVALUATION_SEED = 2**40
SEEDS_APART = 2**20
BETAS = (0.9, 0.95)
CLIP = 1.0
FINAL_LR = 0.1  # of the peak
# What a result depends on and its grid does not say.
SETTINGS = {
    "hidden": HIDDEN, "feed_forward": FEED_FORWARD, "layers": LAYERS, "heads": HEADS, "window": WINDOW, "chunk": CHUNK,
    "gate_rank": GATE_RANK, "ns_period": NS_PERIOD, "eta_sum": ETA_SUM, "orthogonal": ORTHOGONAL, "init_std": INIT_STD,
    "embedding_std": EMBEDDING_STD, "betas": BETAS, "clip": CLIP,
    **{f"memory.{start}": getattr(MemoryConfig(), start) for start in STARTS},
}  # fmt: skip
NOTHING: dict[str, float | None] = {"accuracy": None, "loss": None}


@dataclass(frozen=True)
class Schedule:
    """AdamW with linear warm-up and linear decay to a tenth."""

    steps: int
    batch: int
    lr: float
    warmup: int
    weight_decay: float = 0.0
    evaluated: int = 8  # batches of the final measurement


def plain_of(mixer: str) -> tuple[str, str]:
    """A mixer's name without the suffix of VARIANTS, and that suffix."""
    suffix = next((suffix for suffix in VARIANTS if mixer.endswith(suffix)), "")
    return mixer.removesuffix(suffix), suffix


def config_of(mixer: str, size: int, tokens: int, vocabulary: int, *, mlp: bool) -> Config:
    """A model of LAYERS mixers (each followed by a SwiGLU MLP, if asked).

    size: head size K = V of a memory; tokens a query sees of a sliding window; not read by full attention.
    Raises ValueError for an unknown mixer or a size that does not fit.
    """
    plain, suffix = plain_of(mixer)
    if plain not in SYMBOLS:
        raise ValueError(f"mixer={mixer!r} is unknown; choose one of {', '.join(SYMBOLS)}")
    symbol, preset = SYMBOLS[plain]
    own = VARIANTS.get(suffix, {})
    config = Config(
        model=ModelConfig(
            pattern=(symbol + "-" * mlp) * LAYERS,
            hidden_size=HIDDEN,
            ffn_hidden_size=FEED_FORWARD,
            vocab_size=vocabulary,
            seq_length=tokens,
            init_std=INIT_STD,
        ),
        memory=_memory(preset, size, own),
        delta=DeltaConfig(heads=HEADS, head_dim=size, **own) if uses(symbol, "delta") else DeltaConfig(),
        attention=AttentionConfig(
            heads=HEADS, head_dim=HIDDEN // HEADS, window=size if mixer == "sliding window" else tokens
        ),
        train=TrainConfig(precision="float32"),
    )
    validate(config, world_size=1)
    return config


def _memory(preset: str, size: int, own: dict[str, Any]) -> MemoryConfig:
    if not preset:
        return MemoryConfig()
    memory = replace(MemoryConfig(), preset=preset, heads=HEADS, head_dim=size, gate_rank=GATE_RANK, **PRESETS[preset])
    # Short sequences: several chunks, and windows shorter than one.
    memory = replace(memory, chunk=min(memory.chunk, CHUNK), window=min(memory.window, WINDOW), eta_sum=ETA_SUM)
    if memory.ns_steps:
        memory = replace(memory, ns_period=NS_PERIOD, eta_start=ORTHOGONAL, alpha_start=RETENTION)
    return replace(memory, **own)


def state_floats(config: Config) -> int:
    """Numbers that all layers carry past the last token of a sequence, convolutions' tails and halos apart.

    A memory: its matrices and their momenta; the delta rules: K x V a head; attention: the keys and values it keeps.
    """
    return sum(costs_of(symbol).state_size(config) for symbol in layers_of(config))


class Asked(nn.Module):
    """A model with logits at the asked positions alone, and, for decoded tasks, the head that spreads one output.

    The head (MAD's compression): output at the last token plus a learned vector of each position, through an MLP.
    """

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__()
        self.model = build_model(config)
        nn.init.normal_(self.model.embedding.word_embeddings.weight, std=EMBEDDING_STD)
        self.asked: Tensor | None = None
        self.spread: nn.Module | None = None
        if task.decoded:
            self.places = nn.Parameter(INIT_STD * torch.randn(task.tokens, HIDDEN, device=device()))
            self.spread = nn.Sequential(
                nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN), nn.RMSNorm(HIDDEN)
            ).to(device())
        # The output layer is most of the work for a large vocabulary: it gets the asked tokens only.
        self.model.output_layer.register_forward_pre_hook(self._select, with_kwargs=True)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [N, vocabulary] and labels [N] of the N asked tokens of the batch."""
        self.asked = batch.labels.T != NO_ANSWER  # Megatron's outputs are [T, B, hidden]
        logits = self.model(batch.tokens, None, None)
        return logits.squeeze(0), batch.labels.T[self.asked]

    def _select(self, module: nn.Module, words: tuple[Tensor, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        hidden, *rest = words
        if self.spread is not None:
            hidden = self.spread(hidden[-1:] + self.places[:, None])
        if self.asked is not None:
            hidden = hidden[self.asked].unsqueeze(1)
        return (hidden, *rest), named


@contextmanager
def one_process(config: Config) -> Iterator[None]:
    """Megatron-Core in a world of one, seeded by the configuration."""
    world.join(config)
    try:
        yield
    finally:
        world.leave()


def train_and_measure(
    config: Config, task: Task, schedule: Schedule, seed: int, measured: dict[str, Task]
) -> dict[str, Any]:
    """Train a fresh model on the task, then measure it on fresh sequences of each of the `measured` tasks.

    Gives each task's accuracy (the share of labels that the likeliest token meets) and loss in nats. Both are None
    where training diverged, with the step. Besides: the model's state and parameters, and the time of a training step.
    """
    config = replace(config, run=replace(config.run, seed=seed))
    with one_process(config):
        asked = Asked(config, task)
        started = time.perf_counter()
        steps = train(asked, task, schedule, seed)
        seconds = (time.perf_counter() - started) / max(1, steps)
        finished = steps == schedule.steps
        found = {name: measure(asked, other, schedule) if finished else NOTHING for name, other in measured.items()}
    return {
        "measured": found,
        "diverged_at_step": None if finished else steps,
        "state_floats": state_floats(config),
        "parameters": num_params(config),
        "milliseconds_a_step": round(1e3 * seconds, 1),
    }


def share(schedule: Schedule, step: int) -> float:
    """The learning rate of a step, as a share of the peak."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    return 1 - (1 - FINAL_LR) * (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)


def train(asked: Asked, task: Task, schedule: Schedule, seed: int) -> int:
    """The loop: a generated batch, cross-entropy at the asked tokens, AdamW.

    Gives the number of steps done: all, or those before a gradient that is not finite.
    """
    optimizer = torch.optim.AdamW(asked.parameters(), lr=schedule.lr, betas=BETAS, weight_decay=schedule.weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share, schedule))
    asked.train()
    for step in range(schedule.steps):
        logits, labels = asked(on_device(task.generate(seed * SEEDS_APART + step, schedule.batch)))
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not nn.utils.clip_grad_norm_(asked.parameters(), CLIP).isfinite():
            return step
        optimizer.step()
        scheduler.step()
    return schedule.steps


@torch.no_grad()
def measure(asked: Asked, task: Task, schedule: Schedule) -> dict[str, float | None]:
    """Accuracy, as the task counts it, and loss over the asked tokens of `schedule.evaluated` fresh batches."""
    asked.eval()
    loss, told, due = 0.0, [], []
    for number in range(schedule.evaluated):
        logits, labels = asked(on_device(task.generate(EVALUATION_SEED + number, schedule.batch)))
        told.append(logits.argmax(-1))
        due.append(labels)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
    answers, labels = torch.cat(told), torch.cat(due)
    right = (answers == labels).float()
    accuracy = by_class(answers, labels) if task.by_class else float(right.mean(dtype=torch.float64))
    return {"accuracy": round(accuracy, 4), "loss": round(loss / len(labels), 4)}


def by_class(answers: Tensor, labels: Tensor) -> float:
    """The mean over the classes of the share of a class's labels that is met.

    A class that was named but never due counts as missed. This is torchmetrics' MulticlassAccuracy, by which MAD
    measures.
    """
    classes = torch.cat([answers, labels]).unique()
    of_class = labels == classes[:, None]
    hits = (of_class & (answers == labels)).sum(1)
    return float((hits / of_class.sum(1).clamp(min=1)).mean(dtype=torch.float64))


def on_device(batch: Batch) -> Batch:
    return Batch(batch.tokens.to(device()), batch.labels.to(device()))
