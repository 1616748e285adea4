"""What a run is: one frozen dataclass for each TOML section.

Every field has a unit or a meaning beside it. `toml.describe` reads these comments out of this file for `--help`, so
that they stand in one place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from atlas_kernels.rule import MemoryRule

# Keys with defaults that change what a saved model is: what they were before there were any.
LATER: dict[str, dict[str, Any]] = {"memory": {"open_gate": False, "copy_start": False}}
# Keys that are read under their former names too.
RENAMED = {("memory", "memory"): "network"}


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    directory: str = "runs/atlas"  # everything the run writes, in a folder of its own
    seed: int = 1234


@dataclass(frozen=True)
class ModelConfig:
    """The stack around the mixers (Llama-style: pre-RMSNorm, SwiGLU)."""

    # One symbol a layer: M memory, * sliding-window attention, F full attention, A memory as a gate of sliding-window
    # attention (MAG), C memory as a context of attention (MAC), - SwiGLU MLP, E experts in its place; | pipeline cut
    # (without any, the blocks are dealt out evenly). M-*- is MAL.
    # Baselines: R GRU, L LSTM, D DeltaNet, G Gated DeltaNet; F-F- is a Transformer++.
    pattern: str = "M-M-*-M-"
    hidden_size: int = 256
    ffn_hidden_size: int = 704
    vocab_size: int = 4096  # rows of the embedding; the tokenizer's vocabulary must fit
    seq_length: int = 512  # tokens of one training sequence
    tied_embeddings: bool = True
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    transformer_engine: bool = False  # linears and norms from Transformer Engine (needs a GPU)


@dataclass(frozen=True)
class MemoryConfig:
    """The neural memory of every `M` layer, with the letters of the paper."""

    # Sets the keys that make a member of the family: atlas, atlas++, omeganet, titans, ttt, delta, dla, swla,
    # deep_transformer, swdt, dot. A key beside the preset wins. A preset on the command line wins over the file.
    preset: str = ""
    network: str = "mlp"  # linear | mlp | gated_mlp: what answers a key with a value
    loss: str = "l2"  # l2 | dot
    # none | layer: a LayerNorm on the memory's output. Deep memories that write raw gradients diverge without the norm.
    # With Newton-Schulz the norm costs bits, and makes outer gradients explode (docs/results/recipe.md).
    norm: str = "none"
    activation: str = "gelu"
    heads: int = 4
    head_dim: int = 64  # K = V
    expansion: int = 4  # F / V of a deep memory
    # lifted: keys pass through feature_map. exponential | softmax (divided by its sum): no finite features, and a cache
    # that grows with the context.
    kernel: str = "lifted"
    feature_map: str = "hadamard"  # identity | hadamard | taylor | sketch
    degree: int = 2  # p of the feature map
    sketch_width: int = 0  # features of each degree from 2 on of feature_map = "sketch"
    window: int = 16  # c of the Omega rule, tokens
    chunk: int = 64  # b, tokens that share one gradient anchor
    # Tokens after which the memory begins anew at its start weights, a multiple of chunk; 0: never. Shards are computed
    # side by side.
    shard: int = 0
    # token: each token reads after its own write. chunk: it reads the weights of its chunk's start (TNT's global
    # memory), which makes a chunk of 2,048 tokens cheap.
    read: str = "token"
    # Local memories beside this one, "chunk/shard" in tokens each, as ["8/2048", "16/2048"] (TNT, arXiv 2511.07343).
    # All write the same keys and values, from learned start weights of their own. The layer reads the sum of all reads.
    # Step sizes start by each memory's own chunk. A third number is the chunk of training, whose step size is kept.
    locals: tuple[str, ...] = ()
    projection: bool = False  # local memories are read with queries moved into the span of their shard's keys
    omega_gates: str = "pair"  # gamma: pair (one a reader and source) | source | none (1)
    momentum: bool = True  # false: S_t = G_t
    step_in_momentum: bool = False  # Titans: eta scales the gradient that enters the momentum, not the write
    retention: bool = True  # false: alpha is 1, nothing decays
    ns_steps: int = 5  # k, Newton-Schulz steps; 0 writes the raw momentum
    ns_period: int = 1  # m, tokens between orthogonalised writes (1 is the paper); divides chunk
    ns_step: str = "last"  # step size of such a write. last: eta of its token. sum: the sum of eta over its m tokens
    ns_coefficients: str = "jordan"  # jordan | polar_express
    # Writing and forgetting follow one gate w that can be exactly 0: the step size is eta's bound times w, and the
    # retention is alpha's gate to the power w. A token that writes nothing forgets nothing. train.write_budget asks the
    # model for zeros.
    write_gate: bool = False
    conv_size: int = 4  # taps of the short convolutions on q, k, v
    # At the start a key is the query of the token before it. A memory then answers with what followed its query, and
    # learns to recall sooner (docs/results/mqar.md). False: keys are drawn independently.
    late_keys: bool = True
    # The output gate has a bias that starts where SiLU is one. Without it reads start scaled by small random numbers.
    open_gate: bool = True
    # Values start as the token alone, and the output matrix as the transpose of the values' matrix. With late_keys and
    # open_gate a memory starts by saying the token that followed what it is asked for (docs/results/recipe.md).
    copy_start: bool = True
    gate_rank: int = 32  # rank of the bottlenecks behind alpha, eta, theta, gamma
    # Retention of one token at initialisation; 0 derives it. With Newton-Schulz: 0.99, which keeps the outer gradient
    # over any number of chunks near one. Without: the start weights fade to a third over seq_length tokens (100 at
    # least). If they faded away, the output norm would divide by almost nothing, and gradients would explode.
    alpha_start: float = 0.0
    theta_start: float = 0.9  # momentum decay at initialisation
    gamma_start: float = 0.5  # Omega gate at initialisation
    # Step size at initialisation; 0 derives it. A learned one stays below 10 times the start.
    # With Newton-Schulz: 0.01 a token (0.0015 for a gated memory).
    # Without: the steps of one chunk, eta x gamma x window / (1 - theta) x chunk, sum to eta_sum. Deep memories diverge
    # where the largest sum passes one. A linear memory with the dot loss has no feedback: the steps of one token sum to
    # eta_sum.
    eta_start: float = 0.0
    eta_sum: float = 0.1  # see eta_start
    # Deep memories: the share of the outer gradient that passes through the weights at which inner gradients are taken.
    # 1 is exact. Less damps each passage, where a recipe of your own explodes. 0 is first order: cheaper, and recall is
    # learned less well. The gradient of a linear memory is always exact.
    anchor_gradient: float = 1.0
    impl: str = "auto"  # reference | chunked | triton (a GPU) | auto

    def rule(self) -> MemoryRule:
        """The part of this section that `atlas_kernels` learns by; raises ValueError where it does not fit together."""
        return MemoryRule.of(self)


@dataclass(frozen=True)
class AttentionConfig:
    """Attention of every `*`, `F`, `A` and `C` layer; `F` sees everything before a token."""

    heads: int = 4
    head_dim: int = 64
    window: int = 128  # tokens a query of `*` and `A` sees, itself included
    rotary_base: float = 10000.0
    persistent: int = 0  # learned tokens that every query sees besides
    segment: int = 128  # tokens of one segment of `C`, which attends within them and reads the memory before them


@dataclass(frozen=True)
class RecurrentConfig:
    """The cells of every `R` (GRU) and `L` (LSTM) layer."""

    heads: int = 4  # recurrences side by side, each of its own
    head_dim: int = 64  # numbers that one of them remembers (LSTM: twice as many)


@dataclass(frozen=True)
class DeltaConfig:
    """The memory of every `D` (DeltaNet) and `G` (Gated DeltaNet) layer."""

    heads: int = 4
    head_dim: int = 64  # K = V
    conv_size: int = 4  # taps of the short convolutions on q, k, v
    # As the memory's; the delta rules of the literature have none of them.
    late_keys: bool = False
    open_gate: bool = False
    copy_start: bool = False
    # auto: flash-linear-attention for bfloat16 on a GPU where it is installed, else chunked, the kernels of the memory.
    impl: str = "auto"  # fla | chunked | auto


@dataclass(frozen=True)
class ExpertsConfig:
    """The SwiGLU MLPs of every `E` layer, of which a router chooses some for each token (Megatron-Core's MoE)."""

    count: int = 8
    top_k: int = 2  # experts of a token; their outputs are weighted by the router's softmax
    ffn_hidden_size: int = 256  # of one expert
    shared_ffn_hidden_size: int = 0  # of one MLP more, which every token passes; 0: none


@dataclass(frozen=True)
class TrainConfig:
    """Optimizer, batches and steps. The learning rate rises linearly, then follows `schedule`."""

    steps: int = 1000
    # A run's directory, or one of its checkpoints: a new run takes its weights and nothing else, in any layout. Steps,
    # schedule, optimizer and data begin anew. memory.chunk may be another than theirs (docs/chunks.md). "": drawn.
    start_from: str = ""
    global_batch: int = 8  # sequences a step
    # "": every step has global_batch. Else tokens and sequences, as Megatron's --step-batch-size-schedule: with
    # "0:64 1B:128 4B:256" a step has 64 sequences, from 1e9 trained tokens on 128, then 256, which is global_batch.
    batch_ramp: str = ""
    micro_batch: int = 8  # sequences a forward pass on one device
    # adamw | muon: Megatron-Core's Muon (needs the `muon` extra) moves the matrices of linears, and
    # muon_scalar_optimizer moves the rest: embeddings, norms, gates, convolutions and start weights.
    optimizer: str = "adamw"
    lr: float = 1e-3  # of both kinds of parameters
    min_lr: float = 1e-4  # where schedule ends, but for constant
    warmup_steps: int = 100
    # After the warm-up. cosine: falls to min_lr at the last step. wsd: stays at lr, and falls in the last decay_steps.
    # constant: stays at lr. inverse_sqrt: lr x (warmup_steps / step)^0.5, min_lr at least.
    schedule: str = "cosine"
    decay_steps: int = 0  # the last steps of wsd, in which the rate falls to min_lr
    decay_shape: str = "linear"  # linear | 1-sqrt (steep first): how wsd falls
    # "": begin at step 1. RUN:STEP, as "runs/stable:4000": begin with what another run kept at that step, weights,
    # moments and place in the data. With wsd, and decay_steps more steps: the decay of a run that itself goes on.
    decay_from: str = ""
    weight_decay: float = 0.1  # not on norms, gates, start weights
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    muon_momentum: float = 0.95  # share of the momentum that stays from step to step
    muon_nesterov: bool = True  # orthogonalise the gradient moved towards the momentum, not the momentum itself
    # simple | quintic | polar_express | cans | aol | deepseekv4: of the Newton-Schulz polynomials, one after the other.
    muon_coefficient_type: str = "quintic"
    muon_num_ns_steps: int = 5  # Newton-Schulz steps a matrix
    # Factor of a rows x columns update, whose singular values are about one: spectral (root of the larger side) |
    # shape_scaling (root of rows / columns, 1 at least) | unit_rms_norm (root of rows / columns).
    muon_scale_mode: str = "spectral"
    # A factor besides. With spectral, 0.2 makes an update as large as AdamW's (arXiv 2502.16982): lr fits both kinds.
    muon_extra_scale_factor: float = 0.2
    muon_split_qkv: bool = True  # q, k, v (and the output gate) of a fused linear are orthogonalised apart
    # Of a matrix that tensor-parallel ranks share: duplicated (each gathers and orthogonalises all of it) | distributed
    # (each its part, products summed) | blockwise (each its part as a matrix of its own: another update than one
    # rank's).
    muon_tp_mode: str = "duplicated"
    # Of the Newton-Schulz products: medium (bfloat16) | high | highest (float32). auto: medium on a GPU, else highest.
    muon_fp32_matmul_prec: str = "auto"
    muon_scalar_optimizer: str = "adam"  # adam (AdamW) | lion: of the parameters that Muon does not move
    # Muon moves the start weights of memories too, each head's matrices apart.
    muon_memories: bool = False
    # Core's layer-wise distributed optimizer: each data- and context-parallel rank holds the states of whole matrices
    # and updates these; the states of the rest are cut as AdamW's always are. False: each rank holds all states.
    muon_layer_wise: bool = False
    clip_grad: float = 1.0
    # Of E layers: how much an uneven load of the experts counts beside the loss, which is reported without it. The load
    # is a micro-batch's: another micro_batch is another loss. 0: it does not count.
    aux_loss: float = 0.01
    precision: str = "auto"  # auto: bfloat16 with float32 master weights on a GPU, float32 on a CPU
    # "": off. hybrid | e4m3: the linears of mixers, attention and MLPs multiply in FP8 (Transformer Engine, from
    # sm_89); the memory's gates, its inner loop and its state never do.
    fp8: str = ""
    fp8_recipe: str = "delayed"  # delayed | tensorwise | blockwise (sm_90) | mxfp8 (sm_100): how FP8 is scaled
    # Of memories with memory.write_gate: how much the mean of sqrt(w + 1e-4) counts beside the loss (which is reported
    # without it). It rises to that over the first quarter of the steps, and from half of them on to
    # late_write_budget, where that is not 0: by then what is read is known, and the rest can be left unwritten.
    write_budget: float = 0.0
    late_write_budget: float = 0.0
    # Tokens over which gradients go back through a memory, in whole chunks; 0: over the whole sequence. A run whose
    # model.seq_length has grown takes a quarter of the length that it began with, as exported models do.
    gradient_reach: int = 0
    recompute: bool = False  # recompute each layer's activations in the backward
    # With recompute: only of the first so many layers of each pipeline stage, each symbol of model.pattern one; 0: all.
    recompute_layers: int = 0
    # Without it, recompute parts of layers that core builds, as ["mlp", "moe"]: mlp (each `-`, but for its norm) | moe
    # (each `E`, likewise) | shared_experts (of each `E`) | layernorm (the norm before each `-` and `E`; needs
    # model.transformer_engine).
    recompute_modules: tuple[str, ...] = ()
    # Capture forward and backward of a step in one CUDA graph, after three eager steps: no kernel then waits for the
    # host. Validation, and steps that measure (stats_every), stay eager.
    cuda_graph: bool = False
    deterministic: bool = False  # two runs of one layout are bit-equal on a GPU too; refuses what cannot be
    validate_every: int = 100  # steps; 0 never
    validate_sequences: int = 64
    validate_silenced: bool = False  # also validate with every memory held at its start weights: what it contributes
    log_every: int = 1  # steps between progress lines; metrics.jsonl has every step
    stats_every: int = 10  # steps between measurements of gates, norms, surprise, spectra and memory share
    # Steps between readings of the live model by tasks of atlas-eval (docs/watching.md), the last step too; 0 never.
    evaluate_every: int = 0
    evaluate_tasks: tuple[str, ...] = ("perplexity", "mqar", "niah_single_1")  # of atlas-eval, those of its own
    evaluate_lengths: str = ""  # tokens of context and question, as "1K,4K" (K is 1,024); "": model.seq_length
    evaluate_samples: int = 16  # examples of a task at each length
    sample_every: int = 0  # steps between texts that the live model writes, the last step too; 0 never
    sample_prompt: str = ""  # what such a text begins with; "": it begins as a document does
    sample_tokens: int = 100  # most tokens that it is continued by
    # START:STOP: a torch.profiler trace of the steps from START up to before STOP, and a table of their operators, in
    # the run's directory. "": none.
    profile: str = ""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 200  # steps
    last: bool = True  # the last step too; false where a run is only timed. A run that is stopped is saved in any case
    keep: int = 2  # newest checkpoints kept
    keep_best: bool = True  # and, of those saved after a validation, the one of the lowest loss
    async_save: bool = False  # written from a copy in memory while training goes on


@dataclass(frozen=True)
class ResilienceConfig:
    """What a run does about hung steps, slow processes, NaN and inf."""

    # Without a finished step, until every process writes the stacks of its threads and ends; 0 never. The first step, a
    # validation and a checkpoint have parallel.timeout_minutes more. Less than that: the stacks then come first.
    hang_minutes: float = 20.0
    # Steps between reports of the slowest process: its time in data and forward passes against the median's. 0 never.
    straggler_every: int = 50
    # stop: a run ends at the first NaN or inf. skip: that batch is passed over and nothing else changes; after so many
    # in a row the run goes back to the newest whole checkpoint, and on with the data behind them.
    non_finite: str = "stop"
    skips_in_a_row: int = 3  # until it goes back
    most_skipped: int = 100  # batches of a whole run; one more, and it stops
    most_returns: int = 3  # to a checkpoint in a whole run; one more, and it stops


@dataclass(frozen=True)
class DataConfig:
    """Megatron .bin/.idx prefixes; a blend is a list of ``"weight prefix"``."""

    # The sets to read, in proportion to weights ("0.7 data/books/train"), to counts of tokens ("20B data/web/train"
    # with K, M, B or T), or, without either, to their sizes. A set that ends begins anew in another order: how often
    # each is read is said before the first step.
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    tokenizer: str = ""  # folder with tokenizer.json
    workers: int = 0  # loader processes
    # Train although the data were made with another tokenizer than data.tokenizer, and resume although the tokenizer or
    # the training data are others than the checkpoint's. Other data are read from their first sequence on.
    allow_change: bool = False
    # Documents of one sequence do not see each other: memories, convolutions and attention begin anew at each.
    packed: bool = False


@dataclass(frozen=True)
class ParallelConfig:
    """Devices along each axis; data parallel is what remains of the world."""

    tensor: int = 1
    sequence: bool = False  # Megatron sequence parallel inside the tensor group
    pipeline: int = 1
    virtual: int = 1  # stages of model.pattern a pipeline rank: every `pipeline`-th one (interleaved schedule)
    # Ranks that share out the experts of each E layer, whole ones. They are those of tensor, context and data: no
    # devices besides, each with tokens of its own.
    expert: int = 1
    # Ranks that hold equal contiguous shards of each sequence.
    context: int = 1
    # How a memory crosses them. heads: all-to-all, all tokens of a share of the heads. handoff: the state, from rank
    # to rank. heads+handoff: the first inside a node, the second between nodes. auto: heads as far as they divide in
    # a node, handed on beyond.
    context_mode: str = "auto"
    devices_per_node: int = 0  # 0: as the launcher says (LOCAL_WORLD_SIZE), else all in one
    # Until a process that does not answer is given up: longer than one writes its share of a checkpoint, and than the
    # first indexes the data.
    timeout_minutes: float = 30.0
    context_slices: int = 0  # of batch x heads that the hand-off is pipelined over; 0: twice the ranks it passes


@dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = True
    wandb: str = ""  # project name; empty is off


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    recurrent: RecurrentConfig = field(default_factory=RecurrentConfig)
    delta: DeltaConfig = field(default_factory=DeltaConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)


def layers_of(config: Config) -> str:
    """One symbol a layer: the pattern without its pipeline cuts."""
    return config.model.pattern.replace("|", "")
