"""What a run is: one frozen dataclass for each TOML section.

Every field has a unit or a meaning beside it. `toml.describe` reads these comments out of this file for `--help`, so
that they stand in one place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from atlas_kernels.layer_start import former_eta_per_token
from atlas_kernels.rule import MemoryRule

# Keys with defaults that change what a saved model is: what they were before there were any, or how that follows from
# the section's other keys.
LATER: dict[str, dict[str, Any]] = {
    "memory": {
        "open_gate": False, "copy_start": False, "residual": True, "eta_per_token": former_eta_per_token,
    }
}  # fmt: skip
# Keys that are read under their former names too.
RENAMED = {("memory", "memory"): "network"}


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what makes it repeatable."""

    directory: str = "runs/atlas"  # folder of this run alone, for all files that it writes; "." is refused
    # Seed of the start weights and of the order of the data. A resumed run refuses another seed, unless
    # data.allow_change is true.
    seed: int = 1234


@dataclass(frozen=True)
class ModelConfig:
    """The stack around the mixers (Llama-style: pre-RMSNorm, SwiGLU)."""

    # One symbol a layer: M memory, * sliding-window attention, F full attention, - SwiGLU MLP, E experts.
    # A: memory as a gate of sliding-window attention (MAG). C: memory as a context of attention (MAC). M-*- is MAL.
    # Baselines: R GRU, L LSTM, D DeltaNet, G Gated DeltaNet; F-F- is a Transformer++.
    # | cuts the layers into pipeline stages; without any, the blocks are dealt out evenly.
    pattern: str = "M-M-*-M-"
    hidden_size: int = 256  # width of the residual stream
    ffn_hidden_size: int = 704  # hidden width of each SwiGLU MLP; divides by parallel.tensor
    vocab_size: int = 4096  # rows of the embedding; the tokenizer's vocabulary must fit
    seq_length: int = 512  # tokens of one training sequence; with memories a multiple of memory.chunk
    tied_embeddings: bool = True  # the output layer uses the matrix of the embedding
    norm_epsilon: float = 1e-5  # added under the root of every RMSNorm
    init_std: float = 0.02  # standard deviation of the start weights of linears and embeddings
    # Take linears and norms from Transformer Engine, of the `gpu` extra. Refused without it, and without a GPU.
    transformer_engine: bool = False


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
    # A deep memory adds its input to its output: M(x) = x + W1 act(W2 x), as in the paper (Eq 42). With it what is
    # written is the value less the key, and a gated memory recalls nothing at its start (docs/results/start_recall.md).
    residual: bool = True
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
    # learns to recall sooner (docs/results/mad.md). False: keys are drawn independently.
    late_keys: bool = True
    # The output gate has a bias that starts where SiLU is one. Without it reads start scaled by small random numbers.
    open_gate: bool = True
    # Values start as the token alone, and the output matrix as the transpose of the values' matrix. With late_keys and
    # open_gate a memory starts by saying the token that followed what it is asked for (docs/results/mad.md).
    copy_start: bool = True
    gate_rank: int = 32  # rank of the bottlenecks behind alpha, eta, theta, gamma
    # Retention of one token at initialisation; 0 derives it. With Newton-Schulz: 0.9975 in chunks of 64 with four
    # writes or more, 0.99 with one write or in chunks of 16; 0.999 for a gated memory. These
    # keep the outer gradient over any number of chunks near one. Without Newton-Schulz: the start weights fade to a
    # third over seq_length tokens (100 at least). If they faded away, the output norm would divide by almost nothing,
    # and gradients would explode.
    alpha_start: float = 0.0
    theta_start: float = 0.9  # momentum decay at initialisation
    gamma_start: float = 0.5  # Omega gate at initialisation
    # Step size at initialisation; 0 derives it. A learned one stays below 10 times the start.
    # With Newton-Schulz: eta_per_token for each token that a write stands for, less in chunks beyond 64 tokens.
    # Without: the steps of one chunk, eta x gamma x window / (1 - theta) x chunk, sum to eta_sum. Deep memories diverge
    # where the largest sum passes one. A linear memory with the dot loss has no feedback: the steps of one token sum to
    # eta_sum.
    eta_start: float = 0.0
    eta_per_token: float = 0.005  # see eta_start; 0.002 for a gated memory (preset atlas++)
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

    heads: int = 4  # attention heads; divide by parallel.tensor
    head_dim: int = 64  # width of a head; even, for the rotary embedding turns pairs
    window: int = 128  # tokens that a query of `*` and `A` sees, itself included
    rotary_base: float = 10000.0  # base of the rotary embedding's frequencies
    persistent: int = 0  # learned tokens that every query sees besides; 0: none. Refused without attention layers
    # Tokens of one segment of `C`. A segment attends within itself, and reads the memory of the segments before it.
    # With parallel.context each rank must hold whole segments.
    segment: int = 128


@dataclass(frozen=True)
class RecurrentConfig:
    """The cells of every `R` (GRU) and `L` (LSTM) layer."""

    heads: int = 4  # recurrences side by side, each with its own weights; divide by parallel.tensor
    head_dim: int = 64  # numbers that one of them remembers; an LSTM remembers twice as many


@dataclass(frozen=True)
class DeltaConfig:
    """The memory of every `D` (DeltaNet) and `G` (Gated DeltaNet) layer."""

    heads: int = 4  # divide by parallel.tensor
    head_dim: int = 64  # width of keys and of values
    conv_size: int = 4  # taps of the short convolutions on q, k, v
    # As the keys of [memory] with these names. They are off here, as in the literature on delta rules.
    late_keys: bool = False  # refused with conv_size = 1
    open_gate: bool = False
    copy_start: bool = False
    # fla: the kernels of flash-linear-attention, bfloat16 on a GPU. chunked: the memory's own code.
    # auto: fla where it is installed and covers the call, else chunked.
    impl: str = "auto"  # fla | chunked | auto


@dataclass(frozen=True)
class ExpertsConfig:
    """The SwiGLU MLPs of every `E` layer, of which a router chooses some for each token (Megatron-Core's MoE)."""

    count: int = 8  # experts of each layer; divides by parallel.expert
    top_k: int = 2  # experts of a token; their outputs are weighted by the router's softmax
    ffn_hidden_size: int = 256  # hidden width of one expert
    # Hidden width of one MLP more, which every token passes; 0: none. Divides by parallel.tensor.
    shared_ffn_hidden_size: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """Optimizer, batches and steps. The learning rate rises linearly, then follows `schedule`."""

    steps: int = 1000  # steps of the optimizer
    # "": start weights are drawn. Else a run's directory or one of its checkpoints: a new run takes its weights alone.
    # Steps, schedule, optimizer and data begin anew. Layout and memory.chunk may differ (docs/chunks.md).
    start_from: str = ""
    global_batch: int = 8  # sequences a step; a multiple of micro_batch x data-parallel replicas
    # "": every step has global_batch. Else TOKENS:SEQUENCES, as in Megatron's --step-batch-size-schedule.
    # "0:64 1B:128 4B:256": 64 sequences a step, 128 from 1e9 trained tokens on, then 256. The last is global_batch.
    batch_ramp: str = ""
    micro_batch: int = 8  # sequences of one forward pass on one device
    # adamw, or muon: Megatron-Core's Muon, which needs the `muon` extra. Muon moves the matrices of linears.
    # muon_scalar_optimizer moves the rest: embeddings, norms, gates, convolutions and start weights.
    optimizer: str = "adamw"
    lr: float = 1e-3  # highest learning rate, of all parameters
    min_lr: float = 1e-4  # learning rate where the schedule ends (constant: not used); not above lr
    warmup_steps: int = 100  # steps over which the learning rate rises to lr; fewer than steps
    # After the warm-up. cosine: falls to min_lr at the last step. wsd: stays at lr, and falls in the last decay_steps.
    # constant: stays at lr. inverse_sqrt: lr x (warmup_steps / step)^0.5, min_lr at least; needs a warm-up.
    schedule: str = "cosine"
    decay_steps: int = 0  # steps in which wsd falls to min_lr; needed with wsd, refused with other schedules
    decay_shape: str = "linear"  # linear | 1-sqrt (steep first): how wsd falls
    # wsd only. "": begin at step 1. RUN:STEP, as "runs/stable:4000": go on from what another run kept at that step.
    # Weights, moments and place in the data are taken. steps must be STEP + decay_steps. Refused with start_from.
    decay_from: str = ""
    weight_decay: float = 0.1  # 0: none. Norms, biases, gates and start weights never decay
    adam_beta1: float = 0.9  # decay of AdamW's mean of gradients
    adam_beta2: float = 0.95  # decay of AdamW's mean of squared gradients
    adam_eps: float = 1e-8  # added to the root of that mean
    # The muon_* keys count with optimizer = "muon" alone; muon_memories and muon_layer_wise are refused without it.
    muon_momentum: float = 0.95  # share of the momentum that stays from step to step
    muon_nesterov: bool = True  # orthogonalise the gradient moved towards the momentum; false: the momentum itself
    # Coefficients of the Newton-Schulz steps: simple | quintic | polar_express | cans | aol | deepseekv4.
    muon_coefficient_type: str = "quintic"
    muon_num_ns_steps: int = 5  # Newton-Schulz steps of each matrix
    # Factor of the update of a rows x columns matrix, whose singular values are about one.
    # spectral: root of the larger side. shape_scaling: root of rows / columns, 1 at least.
    # unit_rms_norm: root of rows / columns.
    muon_scale_mode: str = "spectral"
    # A factor besides. With spectral, 0.2 makes an update as large as AdamW's (arXiv 2502.16982), so lr fits both.
    muon_extra_scale_factor: float = 0.2
    muon_split_qkv: bool = True  # orthogonalise q, k, v (and the output gate) of a fused linear apart
    # How ranks orthogonalise a matrix that tensor parallelism has cut. duplicated: each rank gathers all of it.
    # distributed: each rank takes its part and sums products. blockwise: each part is a matrix of its own, so the
    # update is not that of one rank.
    muon_tp_mode: str = "duplicated"
    # Precision of the Newton-Schulz products: medium (bfloat16) | high | highest (float32).
    # auto: medium on a GPU, else highest.
    muon_fp32_matmul_prec: str = "auto"
    muon_scalar_optimizer: str = "adam"  # adam (AdamW) | lion: of the parameters that Muon does not move
    # Muon moves the start weights of memories too, each head's matrices apart. Refused with memory.locals.
    muon_memories: bool = False
    # Core's layer-wise distributed optimizer. Each data- and context-parallel rank updates whole matrices and holds
    # their states. The states of the rest are cut as AdamW's always are. False: each rank holds all states.
    # Refused with precision = "float32" and with muon_scalar_optimizer = "lion".
    muon_layer_wise: bool = False
    clip_grad: float = 1.0  # largest norm of all gradients together; 0: no clipping
    # Of E layers: how much an uneven load of the experts counts beside the loss, which is reported without it.
    # The load is a micro-batch's, so another micro_batch is another loss. 0: it does not count.
    aux_loss: float = 0.01
    # float32 | bfloat16 (with float32 master weights) | auto: bfloat16 on a GPU, float32 on a CPU.
    precision: str = "auto"
    # "": off. hybrid | e4m3: linears of mixers, attention and MLPs multiply in FP8. The memory's gates, its inner loop
    # and its state never do. Needs model.transformer_engine and sm_89, and sizes that are multiples of 16.
    fp8: str = ""
    fp8_recipe: str = "delayed"  # delayed | tensorwise | blockwise (sm_90) | mxfp8 (sm_100): how FP8 is scaled
    # Weight of the mean of sqrt(w + 1e-4) beside the loss, w being the gate of memory.write_gate, which it needs.
    # It rises over the first quarter of the steps. The reported loss is without it. 0: off.
    write_budget: float = 0.0
    # Weight that write_budget moves to between half and nine tenths of the steps; 0: it stays. Needs write_budget.
    # By then the model knows what it reads, and can leave the rest unwritten.
    late_write_budget: float = 0.0
    # Tokens over which gradients go back through a memory, a multiple of memory.chunk; 0: over the whole sequence.
    # A run whose model.seq_length has grown takes a quarter of its first length, as exported models do.
    gradient_reach: int = 0
    recompute: bool = False  # recompute each layer's activations in the backward: less memory, more time
    # With recompute: only the first so many layers of each pipeline stage; a symbol of model.pattern is one. 0: all.
    recompute_layers: int = 0
    # Without recompute: parts of the layers that Megatron-Core builds, as ["mlp", "moe"].
    # mlp: each `-`, but for its norm. moe: each `E`, likewise. shared_experts: the shared MLP of each `E`.
    # layernorm: the norm before each `-` and `E`; needs model.transformer_engine.
    recompute_modules: tuple[str, ...] = ()
    # After three eager steps, capture forward and backward of a step in one CUDA graph. Kernels do not wait for the
    # host then. Validation, and steps that measure (stats_every), stay eager.
    # Refused with data.packed, batch_ramp, write_budget, recompute, recompute_modules, fp8, and with parallel.pipeline
    # or parallel.context over 1.
    cuda_graph: bool = False
    # Two runs of one layout give equal bits, on a GPU too. What cannot be deterministic is refused.
    deterministic: bool = False
    validate_every: int = 100  # steps between validations; 0: never
    validate_sequences: int = 64  # sequences of each validation
    # Validate once more with every memory held at its start weights. The difference is what memories contribute.
    # Refused without memory layers.
    validate_silenced: bool = False
    log_every: int = 1  # steps between progress lines; metrics.jsonl has every step
    stats_every: int = 10  # steps between measurements of gates, norms, surprise, spectra and memory share
    # Steps between evaluations of the live model by tasks of atlas-eval (docs/watching.md); 0: never. The last step
    # is one of them.
    evaluate_every: int = 0
    evaluate_tasks: tuple[str, ...] = ("perplexity", "mqar", "niah_single_1")  # names of tasks of atlas-eval
    evaluate_lengths: str = ""  # tokens of context and question, as "1K,4K" (K is 1,024); "": model.seq_length
    evaluate_samples: int = 16  # examples of each task at each length
    sample_every: int = 0  # steps between texts that the live model writes, the last step too; 0: never
    sample_prompt: str = ""  # the beginning of such a text; "": the beginning of a document
    sample_tokens: int = 100  # tokens that the model adds at most
    # START:STOP, as "10:13": write a torch.profiler trace of the steps from START up to before STOP, and a table of
    # their operators, into the run's directory. "": none.
    profile: str = ""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 200  # steps between checkpoints
    # Save the last step too; false for a run that is only timed. A run that is stopped is saved in any case.
    last: bool = True
    keep: int = 2  # newest checkpoints kept
    keep_best: bool = True  # of those saved after a validation, keep the one of the lowest loss too
    async_save: bool = False  # write from a copy in memory while training goes on; the copy takes that much memory


@dataclass(frozen=True)
class ResilienceConfig:
    """What a run does about hung steps, slow processes, NaN and inf."""

    # Minutes without a finished step, after which every process writes the stacks of its threads and ends. 0: never.
    # The first step, a validation and a checkpoint have parallel.timeout_minutes more. Below that value the
    # stacks come before the timeout.
    hang_minutes: float = 20.0
    # Steps between reports of the slowest process: its time in data and forward passes against the median's. 0: never.
    straggler_every: int = 50
    # stop: end the run at the first NaN or inf. skip: pass over that batch and change nothing else. After
    # skips_in_a_row of them the run goes back to the newest whole checkpoint, and on with the data after them.
    non_finite: str = "stop"
    skips_in_a_row: int = 3  # batches passed over in a row before the run goes back
    most_skipped: int = 100  # batches passed over in a whole run; one more stops it
    most_returns: int = 3  # returns to a checkpoint in a whole run; one more stops it


@dataclass(frozen=True)
class DataConfig:
    """Megatron .bin/.idx prefixes; a blend is a list of ``"weight prefix"``."""

    # Data sets to read. Each may have a weight ("0.7 data/books/train") or a count of tokens ("20B data/web/train",
    # with K, M, B or T). Without either, sets count by their size. A set that ends begins anew in another order.
    # How often each is read is printed before the first step.
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()  # data sets to validate on, written as in train
    tokenizer: str = ""  # folder with tokenizer.json
    workers: int = 0  # processes that load data; 0: the training process does it
    # Train although another tokenizer made the data. Resume although the tokenizer, the training data or run.seed
    # differ from the checkpoint's. Other data are read from their first sequence on.
    allow_change: bool = False
    # Documents of one sequence do not see each other: memories, convolutions and attention begin anew at each.
    # Refused with C layers and with exponential kernels.
    packed: bool = False


@dataclass(frozen=True)
class ParallelConfig:
    """Devices along each axis; data parallel is what remains of the world."""

    # Tensor-parallel ranks; heads, model.ffn_hidden_size and model.vocab_size divide by it.
    # The number of processes must be a multiple of tensor x pipeline x context.
    tensor: int = 1
    sequence: bool = False  # Megatron's sequence parallelism in the tensor group; needs tensor > 1
    pipeline: int = 1  # pipeline ranks; model.pattern has one stage for each
    # Stages of model.pattern on each pipeline rank (interleaved schedule): every `pipeline`-th one. Needs pipeline > 1.
    virtual: int = 1
    # Ranks that share out the experts of each E layer, whole ones; experts.count divides by it. They are no devices
    # besides: they are taken from those of tensor, context and data, each with tokens of its own.
    expert: int = 1
    context: int = 1  # ranks that hold equal contiguous shards of each sequence
    # How a memory works over those ranks. heads: all-to-all, each rank gets all tokens of a share of the heads.
    # handoff: the state goes from rank to rank. heads+handoff: heads inside a node, handoff between nodes.
    # auto: heads as far as they divide inside a node, handoff beyond.
    context_mode: str = "auto"
    devices_per_node: int = 0  # 0: what the launcher says (LOCAL_WORLD_SIZE), else one node for all
    # Minutes until a process that does not answer is given up. Longer than the first process takes to index the data,
    # and than any takes to write its share of a checkpoint.
    timeout_minutes: float = 30.0
    # Slices of batch x heads in which the state is handed on, one behind the other. 0: twice the ranks that it passes.
    context_slices: int = 0


@dataclass(frozen=True)
class LogConfig:
    tensorboard: bool = True  # write TensorBoard files into the run's directory
    wandb: str = ""  # name of a Weights & Biases project; "": off


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
