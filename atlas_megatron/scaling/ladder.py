"""One dial from 0.15M to 7B: a rung's name is its number of parameters N, and everything else follows from it.

    what            formula                                               source
    width / depth   least squares in logs through the paper's Table 7:    43 to 114 there; 147 at 7B, where Llama has
                    67 at 0.49B, rising with N^0.30                       128
    width           a quarter of a power of two, times 4 to 7, that      heads and shards that divide
                    comes nearest to that ratio and to the MLP's width
    heads           width / head_dim, head_dim 64 (CPU: 32)               64: the paper's 340M
    MLP             what N leaves for it, 8/3 of the width as far as      Llama's SwiGLU; the paper gives none
                    whole layers allow
    learning rate   least squares in logs through Table 7: 1.4e-3 at      Table 7; 2.5e-4 at 7B, where Llama has 3e-4
                    0.49B, falling with N^0.65
    tokens          20 a parameter                                        Hoffmann et al. 2022 (Chinchilla)
    batch           0.5M tokens x (tokens / 15B)^0.5, a power of two of   0.5M at 15B: the paper's Appendix E; the root:
                    sequences                                             Zhang et al. 2024, critical batch and data
    warm-up         a tenth of the steps, 1000 at most                    chosen here; the paper gives none
    final rate      a tenth of the peak                                   chosen here
    nodes           one to a billion parameters, a power of two           chosen here

Below the smallest model of Table 7 its ratio and learning rate are kept: the lines are not followed to where nothing
was measured and rates would diverge. N counts everything, tied embeddings once, but for the rungs of a CPU, whose name
leaves the embedding out: of 0.3M parameters it would be most.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy

from atlas_megatron.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from atlas_megatron.config.checks import validate
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.estimate.memory import footprint, fullest
from atlas_megatron.model.build import num_params


class Published(NamedTuple):
    """One row of the paper's Table 7."""

    size: float
    depth: int
    width: int
    lr: float


TABLE_7 = (
    Published(170e6, 12, 768, 3e-3),
    Published(340e6, 24, 1024, 1.5e-3),
    Published(760e6, 24, 1536, 1.25e-3),
    Published(1.3e9, 18, 2048, 7e-4),
)
BATCH_TOKENS, AT_TOKENS = 524288, 15e9
TOKENS_PER_PARAMETER = 20.0
MLP_RATIO = 8 / 3
MEMORY = "M"  # the mixer of a rung's blocks, in model.pattern
WARMUP, MOST_WARMUP = 0.1, 1000
# What the memory estimate does not see: the allocator's gaps, NCCL's buffers.
FREE_SHARE = 0.1


@dataclass(frozen=True)
class Setting:
    """What the rungs of one ladder share: what they read and what they run on."""

    vocab_size: int
    seq_length: int
    data: str  # folder of train, validation and tokenizer
    counts_embedding: bool
    head_dim: int
    width_multiple: int
    mlp_multiple: int
    ns_period: int
    precision: str
    pass_tokens: int  # of one forward pass on one device, at most
    validate_sequences: int
    gpus_per_node: int  # 0: one process on a CPU
    memory: float  # bytes of a device


GPU = Setting(
    vocab_size=32000, seq_length=4096, data="data/corpus", counts_embedding=True, head_dim=64, width_multiple=128,
    mlp_multiple=64, ns_period=16, precision="bfloat16", pass_tokens=32768, validate_sequences=128, gpus_per_node=8,
    memory=80 * 2**30,
)  # fmt: skip
# On the quickstart's corpus. One orthogonalised write a chunk, as there.
CPU = Setting(
    vocab_size=4096, seq_length=512, data="data/quickstart", counts_embedding=False, head_dim=32, width_multiple=32,
    mlp_multiple=8, ns_period=64, precision="float32", pass_tokens=2048, validate_sequences=88, gpus_per_node=0,
    memory=4 * 2**30,
)  # fmt: skip
RUNGS = {
    **dict.fromkeys(("0.15M", "0.3M", "0.6M", "1.2M"), CPU),
    **dict.fromkeys(("20M", "40M", "85M", "170M", "340M", "760M", "1.3B", "3B", "7B"), GPU),
}


def named(name: str) -> str:
    """The rung's own spelling of a name; raises ValueError for an unknown one, with the nearest."""
    spellings = {rung.lower(): rung for rung in RUNGS}
    if name.lower() in spellings:
        return spellings[name.lower()]
    try:
        size = size_of(name)
        nearest = f"the nearest is {min(RUNGS, key=lambda rung: abs(math.log(size_of(rung) / size)))}; "
    except (ValueError, LookupError, ArithmeticError):
        nearest = ""  # no size, nothing to be near to
    raise ValueError(f"{name!r} is no rung; {nearest}rungs: {', '.join(RUNGS)}")


def size_of(name: str) -> float:
    """N, from the name."""
    return float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1].upper()]


def counted(config: Config, setting: Setting) -> int:
    """The parameters that a rung is named by."""
    model = config.model
    return num_params(config) - (0 if setting.counts_embedding else model.vocab_size * model.hidden_size)


def width_to_depth(size: float) -> float:
    return _through_table(size, [row.width / row.depth for row in TABLE_7])


def learning_rate(size: float) -> float:
    return float(f"{_through_table(size, [row.lr for row in TABLE_7]):.2g}")


def _through_table(size: float, values: list[float]) -> float:
    slope, start = numpy.polyfit(numpy.log([row.size for row in TABLE_7]), numpy.log(values), 1)
    return math.exp(start + slope * math.log(max(size, TABLE_7[0].size)))


def batch_sequences(tokens: float, seq_length: int) -> int:
    """Sequences of a step: a power of two, so that replicas divide it."""
    sequences = BATCH_TOKENS * (tokens / AT_TOKENS) ** 0.5 / seq_length
    return 2 ** max(2, round(math.log2(sequences)))


def nodes_of(name: str) -> int:
    return 2 ** math.ceil(math.log2(max(1.0, size_of(name) / 1e9)))


def rung(
    name: str,
    *,
    tokens_per_parameter: float = TOKENS_PER_PARAMETER,
    symbol: str = MEMORY,
    setting: Setting | None = None,
) -> Config:
    """The configuration of a rung, laid out on its nodes.

    symbol: the mixer of its blocks; another one than the memory gets the memory's width and depth, and an MLP that
    makes it as large. setting: other devices or data than the ladder's own.
    Raises ValueError for an unknown rung, tokens that are not above 0, and devices that it does not fit.
    """
    name = named(name)
    setting = setting or RUNGS[name]
    if not 0 < tokens_per_parameter < math.inf:
        raise ValueError(f"{tokens_per_parameter:g} tokens a parameter must be above 0; 20 is the usual number")
    config = _trained(_shaped(name, setting), name, tokens_per_parameter, setting)
    if symbol != MEMORY:
        blocks = config.model.pattern.count(MEMORY)
        config = replace(config, model=replace(config.model, pattern=f"{symbol}-" * blocks))
        config = _with_mlp(config, size_of(name), setting)
    return _placed(config, name, setting)


def _shaped(name: str, setting: Setting) -> Config:
    """Width, depth and MLP: those whose ratios come nearest to the wanted ones, among all that have N parameters."""
    size, wanted = size_of(name), width_to_depth(size_of(name))

    def distance(config: Config) -> float:
        model = config.model
        ratio = model.hidden_size / model.pattern.count(MEMORY)
        return abs(math.log(ratio / wanted)) + abs(math.log(model.ffn_hidden_size / model.hidden_size / MLP_RATIO))

    return min(_candidates(size, setting), key=distance)


def _candidates(size: float, setting: Setting) -> Iterator[Config]:
    for heads, depth in itertools.product(range(1, 97), range(2, 65)):
        width = heads * setting.head_dim
        multiple = max(setting.width_multiple, 2 ** (width.bit_length() - 3))
        # A block of width w and an MLP of 8/3 w has about 13 w^2 parameters: others are not worth building.
        if width % multiple or not 0.25 < 13 * width**2 * depth / size < 1.5:
            continue
        config = Config(
            model=ModelConfig(
                pattern=f"{MEMORY}-" * depth,
                hidden_size=width,
                vocab_size=setting.vocab_size,
                seq_length=setting.seq_length,
                tied_embeddings=True,
            ),
            memory=replace(
                MemoryConfig(preset="atlas", **PRESETS["atlas"]),
                heads=heads, head_dim=setting.head_dim, gate_rank=min(32, width // 4), ns_period=setting.ns_period,
            ),
            attention=AttentionConfig(heads=heads, head_dim=setting.head_dim),
        )  # fmt: skip
        config = _with_mlp(config, size, setting)
        if width <= config.model.ffn_hidden_size <= 6 * width:
            yield config


def _with_mlp(config: Config, size: float, setting: Setting) -> Config:
    """With the MLP that brings the parameters to N."""
    model = config.model
    bare = counted(replace(config, model=replace(model, ffn_hidden_size=0)), setting)
    exact = (size - bare) / (3 * model.hidden_size * model.pattern.count("-"))
    width = max(1, round(exact / setting.mlp_multiple)) * setting.mlp_multiple
    return replace(config, model=replace(model, ffn_hidden_size=width))


def _trained(config: Config, name: str, tokens_per_parameter: float, setting: Setting) -> Config:
    """With its learning rate, batch, steps, data and directory."""
    size = size_of(name)
    tokens, lr = tokens_per_parameter * size, learning_rate(size)
    batch = batch_sequences(tokens, setting.seq_length)
    steps = max(10, math.ceil(tokens / (batch * setting.seq_length)))
    return replace(
        config,
        run=RunConfig(directory=f"runs/scale/{name.lower()}"),
        train=TrainConfig(
            steps=steps,
            global_batch=batch,
            lr=lr,
            min_lr=float(f"{lr / 10:.2g}"),
            warmup_steps=min(MOST_WARMUP, int(WARMUP * steps)),
            precision=setting.precision,
            validate_every=max(1, steps // 10),
            validate_sequences=setting.validate_sequences,
            log_every=10,
            stats_every=100,
        ),
        checkpoint=CheckpointConfig(every=min(1000, max(1, steps // 4)), keep=2),
        data=DataConfig(
            train=(f"{setting.data}/train",),
            validation=(f"{setting.data}/validation",),
            tokenizer=f"{setting.data}/tokenizer",
        ),
    )


def _placed(config: Config, name: str, setting: Setting) -> Config:
    """On the rung's devices: the largest passes that fit, without recomputation and tensor shards if that is possible.

    Raises ValueError where nothing fits, with what the leanest layout would hold.
    """
    devices = nodes_of(name) * max(1, setting.gpus_per_node)
    most = min(config.train.global_batch, max(1, setting.pass_tokens // setting.seq_length))
    passes = [2**power for power in reversed(range(most.bit_length()))]
    shards = [tensor for tensor in (1, 2, 4, 8) if tensor <= max(1, setting.gpus_per_node)]
    least = math.inf
    for recompute, tensor, micro_batch in itertools.product((False, True), shards, passes):
        layout = replace(
            config,
            train=replace(config.train, micro_batch=micro_batch, recompute=recompute),
            parallel=ParallelConfig(tensor=tensor, sequence=tensor > 1, devices_per_node=setting.gpus_per_node),
        )
        try:
            validate(layout, devices)
        except ValueError:
            continue  # a batch or heads that do not divide: another layout may
        bf16 = setting.precision == "bfloat16"
        held = footprint(layout, devices, fullest(layout, devices, bf16=bf16), bf16=bf16).total
        if held <= (1 - FREE_SHARE) * setting.memory:
            return layout
        least = min(least, held)
    if least == math.inf:
        validate(config, devices)
    raise ValueError(
        f"rung {name} does not fit {devices} devices of {setting.memory / 2**30:.3g} GiB: at its leanest it holds "
        f"about {least / 2**30:.3g} GiB of each, and a tenth stays free; give larger devices, or take a smaller rung"
    )
