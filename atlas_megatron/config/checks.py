"""What must hold between the fields of a Config, and between it and the devices it runs on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from atlas_kernels import MemoryRule
from atlas_kernels.features import FEATURE_MAPS, lifted_width
from atlas_kernels.local_memories import locals_of
from atlas_megatron.config import LAYERS, Config, uses
from atlas_megatron.config.batch_ramp import stages
from atlas_megatron.config.context_levels import context_levels
from atlas_megatron.config.expert_checks import check_experts
from atlas_megatron.config.gpu_checks import check_cuda_graph, check_fp8
from atlas_megatron.config.layers import CUT, split_sections
from atlas_megatron.config.optimizer_checks import check_optimizer
from atlas_megatron.config.scale_checks import check_depths, check_recompute
from atlas_megatron.config.schedule_checks import check_schedule
from atlas_megatron.config.watching_checks import check_watching

CONTEXT_MODES = ("auto", "heads", "handoff", "heads+handoff")
# Of one process: each is a process more.
MOST_WORKERS = 1024
LONGEST_MINUTES = 365 * 24 * 60
# Lifted features a head: a memory's matrices grow with them.
WIDEST = 4096

# What numpy's generators take, with room for Megatron's streams behind it.
LARGEST_SEED = 2**32 - 2**20 - 1
# Keys, what holds of their values, and how it is said. Written so that NaN holds nowhere.
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "model.hidden_size model.ffn_hidden_size model.vocab_size model.seq_length model.norm_epsilon model.init_std "
        "memory.heads memory.head_dim memory.expansion memory.degree memory.conv_size memory.gate_rank memory.eta_sum "
        "memory.eta_per_token "
        "attention.heads attention.head_dim attention.window attention.rotary_base attention.segment "
        "recurrent.heads recurrent.head_dim delta.heads delta.head_dim delta.conv_size "
        "experts.count experts.top_k experts.ffn_hidden_size parallel.expert "
        "train.steps train.global_batch train.micro_batch train.lr train.adam_eps train.log_every train.stats_every "
        "train.muon_num_ns_steps train.muon_extra_scale_factor train.evaluate_samples train.sample_tokens "
        "checkpoint.every checkpoint.keep resilience.skips_in_a_row "
        "parallel.tensor parallel.pipeline parallel.virtual parallel.context parallel.timeout_minutes",
        lambda value: value > 0,
        "be greater than 0",
    ),
    (
        "train.warmup_steps train.decay_steps train.weight_decay train.clip_grad train.validate_every "
        "train.validate_sequences train.min_lr train.write_budget train.late_write_budget train.gradient_reach "
        "resilience.hang_minutes resilience.straggler_every resilience.most_skipped resilience.most_returns "
        "attention.persistent train.evaluate_every train.sample_every train.recompute_layers train.aux_loss "
        "experts.shared_ffn_hidden_size",
        lambda value: value >= 0,
        "be 0 or more",
    ),
    ("memory.alpha_start", lambda value: 0 <= value < 1, "be 0 (derived) or lie between 0 and 1"),
    ("memory.eta_start", lambda value: value >= 0, "be 0 (derived) or more"),
    ("memory.theta_start memory.gamma_start", lambda value: 0 < value < 1, "lie between 0 and 1, both excluded"),
    ("train.adam_beta1 train.adam_beta2 train.muon_momentum", lambda value: 0 <= value < 1, "lie in [0, 1)"),
    (
        "data.workers",
        lambda value: 0 <= value <= MOST_WORKERS,
        f"be 0 (none beside the process itself) or more, {MOST_WORKERS} at most",
    ),
    ("parallel.devices_per_node parallel.context_slices", lambda value: value >= 0, "be 0 (found out) or more"),
)
CHOICES: dict[str, tuple[str, ...]] = {
    "memory.feature_map": tuple(FEATURE_MAPS),
    "memory.omega_gates": ("pair", "source", "none"),
    "memory.impl": ("auto", "reference", "chunked", "triton"),
    "delta.impl": ("auto", "fla", "chunked"),
    "parallel.context_mode": CONTEXT_MODES,
    "train.schedule": ("cosine", "wsd", "constant", "inverse_sqrt"),
    "train.decay_shape": ("linear", "1-sqrt"),
    "train.precision": ("auto", "float32", "bfloat16"),
    "train.optimizer": ("adamw", "muon"),
    # Those of emerging-optimizers 0.3.0.
    "train.muon_coefficient_type": ("simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"),
    "train.muon_scale_mode": ("spectral", "shape_scaling", "unit_rms_norm"),
    "train.muon_tp_mode": ("duplicated", "distributed", "blockwise"),
    "train.muon_fp32_matmul_prec": ("auto", "medium", "high", "highest"),
    "train.muon_scalar_optimizer": ("adam", "lion"),
    "resilience.non_finite": ("stop", "skip"),
    "train.fp8": ("", "hybrid", "e4m3"),
    "train.fp8_recipe": ("delayed", "tensorwise", "blockwise", "mxfp8"),
}


def validate(config: Config, world_size: int) -> None:
    """Raise ValueError where fields contradict each other, or do not fit `world_size` devices."""
    _check_ranges(config)
    _check_choices(config)
    _check_together(config)
    check_schedule(config.train)
    check_watching(config)
    _check_parallel(config, world_size)
    _check_model(config)
    _check_batches(config, world_size)
    check_fp8(config)
    check_cuda_graph(config)
    check_optimizer(config)
    check_recompute(config)
    check_experts(config, world_size)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Model replicas in a world of `world_size` devices."""
    return world_size // (config.parallel.tensor * config.parallel.pipeline * config.parallel.context)


def sequences_together(config: Config, world_size: int) -> int:
    """What a batch has to be a multiple of: a micro-batch a replica, and interleaved one for each pipeline rank."""
    parallel = config.parallel
    group = parallel.pipeline if parallel.virtual > 1 else 1
    return config.train.micro_batch * data_parallel_size(config, world_size) * group


def _check_ranges(config: Config) -> None:
    for names, holds, rule in RANGES:
        for name in names.split():
            section, key = name.split(".")
            value = getattr(getattr(config, section), key)
            if not holds(value):
                raise ValueError(f"{name}={value} must {rule}")
    for name, minutes in (
        ("parallel.timeout_minutes", config.parallel.timeout_minutes),
        ("resilience.hang_minutes", config.resilience.hang_minutes),
    ):
        if minutes > LONGEST_MINUTES:
            raise ValueError(f"{name}={minutes} is longer than a year; give {LONGEST_MINUTES} minutes at most")
    if not 0 <= config.run.seed <= LARGEST_SEED:
        raise ValueError(f"run.seed={config.run.seed} is out of range; give a number from 0 to {LARGEST_SEED}")


def _check_choices(config: Config) -> None:
    for name, known in CHOICES.items():
        section, key = name.split(".")
        given = getattr(getattr(config, section), key)
        if given not in known:
            words = ", ".join(word or "''" for word in known)
            raise ValueError(f"{name}={given!r} is unknown; choose one of {words}")


def _check_together(config: Config) -> None:
    """Keys of one section that contradict each other."""
    for name, section in (("memory", config.memory), ("delta", config.delta)):
        if section.late_keys and section.conv_size == 1 and uses(config.model.pattern, name):
            raise ValueError(
                f"{name}.late_keys=true with {name}.conv_size=1, whose keys see no token before their own; set "
                f"{name}.late_keys=false, or more taps"
            )
    # "", "." and a parent are folders of other things; what a run writes would lie among them.
    if Path(config.run.directory).name in ("", ".."):
        raise ValueError(
            f"run.directory={config.run.directory!r} is no folder of a run's own; name one, for example runs/first"
        )


def _check_parallel(config: Config, world_size: int) -> None:
    parallel = config.parallel
    if parallel.sequence and parallel.tensor == 1:
        raise ValueError("parallel.sequence=true with parallel.tensor=1; set it false, or tensor to 2 or more")
    needed = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % needed:
        raise ValueError(
            f"a world of {world_size} does not divide into parallel.tensor={parallel.tensor} x pipeline="
            f"{parallel.pipeline} x context={parallel.context} = {needed}; start a multiple of {needed} processes"
        )
    if parallel.virtual > 1 and parallel.pipeline == 1:
        raise ValueError(
            f"parallel.virtual={parallel.virtual} with parallel.pipeline=1, where nothing is to be interleaved; "
            "set virtual to 1, or pipeline to 2 or more"
        )
    stages, wanted = config.model.pattern.count("|") + 1, parallel.pipeline * parallel.virtual
    if stages != wanted:
        off = f"{wanted - stages} are missing" if stages < wanted else f"{stages - wanted} are too many"
        raise ValueError(
            f"model.pattern={config.model.pattern!r} has {stages} pipeline stages, parallel.pipeline="
            f"{parallel.pipeline} x virtual={parallel.virtual} = {wanted}; put {wanted - 1} cuts '|' between its "
            f"layers: {off}"
        )
    split = [("model.ffn_hidden_size", config.model.ffn_hidden_size), ("model.vocab_size", config.model.vocab_size)]
    split += [(f"{name}.heads", getattr(config, name).heads) for name in split_sections(config.model.pattern)]
    for name, size in split:
        if size % parallel.tensor:
            raise ValueError(
                f"{name}={size} does not divide by parallel.tensor={parallel.tensor}; make it a multiple of it"
            )
    _check_context(config)


def _check_context(config: Config) -> None:
    """Shards of the sequence: over context-parallel ranks, and over tensor-parallel ones between the linears."""
    parallel, length, pattern = config.parallel, config.model.seq_length, config.model.pattern
    shards = parallel.context * (parallel.tensor if parallel.sequence else 1)
    if length % shards:
        raise ValueError(
            f"model.seq_length={length} does not divide by parallel.context={parallel.context}"
            f"{f' x tensor={parallel.tensor} (parallel.sequence)' if parallel.sequence else ''}; nearest: "
            f"{max(1, round(length / shards)) * shards}"
        )
    if parallel.context == 1:
        return
    segmented = _segmented(pattern)
    if segmented and length // parallel.context % config.attention.segment:
        raise ValueError(
            f"{segmented} layers want whole segments on each rank: model.seq_length={length} / parallel.context="
            f"{parallel.context} = {length // parallel.context} is no multiple of attention.segment="
            f"{config.attention.segment}; change one of them"
        )
    _, handed = context_levels(config)
    if (handed > 1 or segmented) and uses(pattern, "memory") and config.memory.kernel != "lifted":
        raise ValueError(
            f"memory.kernel={config.memory.kernel!r} keeps a state that grows with the sequence and is not handed on; "
            f"take parallel.context_mode='heads', and a parallel.context that divides memory.heads="
            f"{config.memory.heads} / tensor={parallel.tensor}"
        )


def _check_model(config: Config) -> None:
    pattern = config.model.pattern
    unknown = sorted(set(pattern) - set(LAYERS) - {CUT})
    check_depths(pattern)
    if unknown:
        raise ValueError(
            f"model.pattern={pattern!r} has unknown symbols "
            f"{' '.join(symbol if symbol.isprintable() else repr(symbol) for symbol in unknown)}; "
            f"use {', '.join(f'{symbol} {layer.kind}' for symbol, layer in LAYERS.items())}, | pipeline cut"
        )
    if not all(pattern.split("|")):
        raise ValueError(f"model.pattern={pattern!r} has a stage without layers; put layers on both sides of every '|'")
    if uses(pattern, "memory"):
        _check_memory(config)
    elif config.train.validate_silenced:
        raise ValueError(
            f"train.validate_silenced=true but model.pattern={pattern!r} has no memory to silence; set it false"
        )
    if config.data.packed:
        _check_packed(config)
    _check_attention(config)


def _check_attention(config: Config) -> None:
    attention, pattern = config.attention, config.model.pattern
    if not uses(pattern, "attention"):
        if attention.persistent:
            raise ValueError(
                f"attention.persistent={attention.persistent} but model.pattern={pattern!r} has no attention to see "
                "them; add *, F, A or C layers, or set attention.persistent=0"
            )
        return
    if attention.head_dim % 2:
        raise ValueError(f"attention.head_dim={attention.head_dim} is odd; rotary needs an even size")
    segmented = _segmented(pattern)
    if segmented and config.parallel.sequence:
        raise ValueError(
            f"parallel.sequence=true with {segmented} layers, which read segment after segment; set it false"
        )


def _segmented(pattern: str) -> str:
    """The symbols of a pattern that compute in whole segments; empty where none does."""
    return ", ".join(symbol for symbol in LAYERS if symbol in pattern and LAYERS[symbol].whole_segments)


def _check_memory(config: Config) -> None:
    memory, length = config.memory, config.model.seq_length
    for name, size in (("chunk", memory.chunk), ("window", memory.window)):
        if size > length:
            raise ValueError(f"memory.{name}={size} is longer than model.seq_length={length}; shorten it")
    try:
        memory.rule()
    except ValueError as error:
        raise ValueError(f"[memory] {error}") from error
    if length % memory.chunk:
        raise ValueError(
            f"model.seq_length={length} is not a multiple of memory.chunk={memory.chunk}; "
            f"nearest: {max(1, round(length / memory.chunk)) * memory.chunk}"
        )
    _check_shards(config)
    if config.train.gradient_reach % memory.chunk:
        nearest = max(1, round(config.train.gradient_reach / memory.chunk)) * memory.chunk
        raise ValueError(
            f"train.gradient_reach={config.train.gradient_reach} is not a multiple of memory.chunk={memory.chunk}; "
            f"nearest: {nearest}"
        )
    if config.train.gradient_reach and memory.kernel != "lifted":
        raise ValueError(
            f"train.gradient_reach={config.train.gradient_reach} with memory.kernel={memory.kernel!r}, which keeps its "
            "sources as they are, and gradients to all of them; set train.gradient_reach=0"
        )
    if memory.step_in_momentum and (memory.omega_gates != "none" or not memory.momentum):
        raise ValueError(
            f"memory.step_in_momentum=true came with omega_gates={memory.omega_gates!r}, momentum="
            f"{str(memory.momentum).lower()}; the step then takes gamma's place: set omega_gates='none', momentum=true"
        )
    if memory.write_gate and memory.ns_period > 1 and memory.ns_step != "sum":
        raise ValueError(
            f"memory.write_gate=true with ns_period={memory.ns_period}, ns_step={memory.ns_step!r}: one token's gate "
            "would decide for its whole period; set memory.ns_step='sum'"
        )
    if config.train.late_write_budget and not config.train.write_budget:
        raise ValueError(
            f"train.late_write_budget={config.train.late_write_budget} rises from train.write_budget=0; set that too"
        )
    if config.train.write_budget and not memory.write_gate:
        raise ValueError(
            f"train.write_budget={config.train.write_budget} with memory.write_gate=false, which has no gate that "
            "keeps to it; set memory.write_gate=true, or train.write_budget=0"
        )
    if memory.kernel != "lifted" and memory.feature_map != "identity":
        raise ValueError(
            f"memory.feature_map={memory.feature_map!r} with memory.kernel={memory.kernel!r}; that kernel lifts by "
            "itself: set memory.feature_map='identity'"
        )
    if memory.feature_map == "sketch" and memory.sketch_width < 1:
        raise ValueError(
            f"memory.sketch_width={memory.sketch_width} with memory.feature_map='sketch'; give the features of each "
            f"degree from 2 on, for example {8 * memory.head_dim}"
        )
    width = lifted_width(memory.feature_map, memory.head_dim, memory.degree, memory.sketch_width)
    if width > WIDEST:
        rows = memory.head_dim * (1 if memory.network == "linear" else memory.expansion)
        raise ValueError(
            f"memory.feature_map={memory.feature_map!r} of degree {memory.degree} lifts head_dim={memory.head_dim} to "
            f"{width} features: {4 * rows * width * memory.heads / 2**20:,.0f} MiB of weights a matrix and sequence, "
            f"more than {WIDEST} features are not taken; use a smaller head_dim or degree, feature_map='sketch', or "
            "'hadamard', which keeps the dimension"
        )


def _check_shards(config: Config) -> None:
    """Raise ValueError where a memory that begins anew, or local ones, do not fit the sequence or its cuts."""
    memory, length, context = config.memory, config.model.seq_length, config.parallel.context
    if memory.projection and not memory.locals:
        raise ValueError(
            "memory.projection=true without local memories, whose queries it moves; set memory.projection=false, or "
            'memory.locals=["16/2048"]'
        )
    shards = {"memory.shard": memory.shard} if memory.shard else {}
    for number, local in enumerate(locals_of(memory)):
        try:
            MemoryRule.of(local)
        except ValueError as error:
            raise ValueError(f"memory.locals[{number}]={memory.locals[number]!r}: {error}") from error
        shards[f"memory.locals[{number}]"] = local.shard
    for name, shard in shards.items():
        if length % shard:
            raise ValueError(
                f"model.seq_length={length} ends inside a shard of {shard} tokens ({name}); nearest: "
                f"{max(1, round(length / shard)) * shard}"
            )
        if context > 1 and length // context % shard:
            raise ValueError(
                f"parallel.context={context} cuts a shard of {shard} tokens ({name}): each rank has model.seq_length="
                f"{length} / {context} = {length // context}; shorten the shard, or take fewer ranks"
            )
    if not shards:
        return
    if config.data.packed and context > 1:
        raise ValueError(
            f"data.packed=true with parallel.context={context} and {', '.join(shards)}: a document's shards do not end "
            "where ranks' tokens do; set data.packed=false, or parallel.context=1"
        )
    if segmented := _segmented(config.model.pattern):
        raise ValueError(
            f"{', '.join(shards)} with {segmented} layers, which read the memory of the segment before; use M or A "
            "layers, or leave the shards out"
        )


def _check_packed(config: Config) -> None:
    pattern, kernel = config.model.pattern, config.memory.kernel
    unpacked = sorted(symbol for symbol in set(pattern) - {CUT} if not LAYERS[symbol].packs)
    if unpacked:
        named = ", ".join(f"{symbol} ({LAYERS[symbol].kind})" for symbol in unpacked)
        packing = " ".join(symbol for symbol, layer in LAYERS.items() if layer.packs)
        raise ValueError(
            f"data.packed=true but {named} of model.pattern={pattern!r} read over document borders; use {packing}, or "
            "set data.packed=false"
        )
    if uses(pattern, "memory") and kernel != "lifted":
        raise ValueError(f"data.packed=true with memory.kernel={kernel!r} (exponential): set data.packed=false")


def _check_batches(config: Config, world_size: int) -> None:
    train = config.train
    replicas, together = data_parallel_size(config, world_size), sequences_together(config, world_size)
    virtual = config.parallel.virtual
    checked = [(f"train.global_batch={train.global_batch}", train.global_batch)]
    if train.batch_ramp:
        checked += [(f"train.batch_ramp={train.batch_ramp!r}: {batch}", batch) for _, batch in stages(config)]
    if train.validate_every:
        checked.append((f"train.validate_sequences={train.validate_sequences}", train.validate_sequences))
    for said, size in checked:
        if size == 0 or size % together:
            interleaved = f" x {config.parallel.pipeline} interleaved pipeline ranks" if virtual > 1 else ""
            raise ValueError(
                f"{said} is not a multiple of train.micro_batch={train.micro_batch} x {replicas} data-parallel "
                f"replicas{interleaved} = {together}; nearest: {max(1, round(size / together)) * together}"
            )
