"""From a Config to core's HybridModel, and what that model costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from atlas_megatron.config import Config, MemoryConfig
from atlas_megatron.layer_specs import stack_spec
from atlas_megatron.mixers.memory import gate_starts, weight_shapes


def parameter_dtype(config: Config) -> torch.dtype:
    """The dtype of parameters and activations that `train.precision` means on this machine."""
    if config.train.precision == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.train.precision]


def transformer_config(config: Config) -> TransformerConfig:
    """Core's view of `config`: Llama-style layers without biases or dropout."""
    model, parallel = config.model, config.parallel
    dtype = parameter_dtype(config)
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=len(model.pattern.replace("|", "")),
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        # Of core's own attention, which is not built; it wants numbers that divide.
        num_attention_heads=config.attention.heads,
        kv_channels=config.attention.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        init_method_std=model.init_std,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        # Drawn whole and cut, on a CPU: the start does not depend on the tensor-parallel size.
        use_cpu_initialization=not on_gpu,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        # Needs Apex's CUDA extension.
        gradient_accumulation_fusion=False,
        recompute_granularity="full" if config.train.recompute else None,
        recompute_method="uniform" if config.train.recompute else None,
        recompute_num_layers=1 if config.train.recompute else None,
    )


def build_model(
    config: Config,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    pg_collection: ProcessGroupCollection | None = None,
    vp_stage: int | None = None,
) -> HybridModel:
    """The model, or this rank's shard and pipeline stage of it.

    torch.distributed, parallel_state and the model-parallel seed must be set, torch's own seed be the same on
    every tensor-parallel rank, and `config` validated. pre_process: with the embedding; post_process: with the
    final norm and the output layer.
    """
    return HybridModel(
        config=transformer_config(config),
        hybrid_stack_spec=stack_spec(config),
        vocab_size=config.model.vocab_size,
        max_sequence_length=config.model.seq_length,
        hybrid_layer_pattern=config.model.pattern,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=config.model.tied_embeddings,
        position_embedding_type="none",
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def num_params(config: Config) -> int:
    """Parameters of the whole model, over all ranks; tied embeddings count once."""
    model, memory, attention = config.model, config.memory, config.attention
    hidden, width, heads = model.hidden_size, memory.heads * memory.head_dim, memory.heads
    gates = len(gate_starts(memory))
    atlas = (
        hidden  # norm before
        + 5 * hidden * width  # q, k, v, output gate; output projection
        + 3 * width * memory.conv_size
        + memory.gate_rank * (hidden + heads * gates)
        + heads * gates  # gate biases
        + (heads * (memory.degree + 1) if memory.feature_map == "hadamard" else 0)
        + width  # norm after
        + heads * sum(rows * cols for rows, cols in weight_shapes(memory))
    )
    layer = {
        "M": atlas,
        "*": hidden + 4 * hidden * attention.heads * attention.head_dim,
        "-": hidden + 3 * hidden * model.ffn_hidden_size,
        "|": 0,
    }
    embeddings = (1 if model.tied_embeddings else 2) * model.vocab_size * hidden
    return embeddings + sum(layer[symbol] for symbol in model.pattern) + hidden


@dataclass(frozen=True)
class Flops:
    """Floating-point operations a token, over all ranks."""

    forward: float
    training: float
    inner: float  # the part of `training` that the memories spend on learning at test time and on being read


def flops_per_token(config: Config) -> Flops:
    """Matrix-product FLOPs of one token of a sequence of `seq_length`, two a multiply-add.

    Linears, in x out: 2 in out. M: q, k, v and output gate, output projection, both halves of the gates, the
    taps of the convolutions, and `memory_flops`. *: its four projections, and 4 x width for each key that a
    query sees (min(t, window) of them at token t). -: three products with ffn_hidden_size. Then the logits.
    Elementwise work (norms, activations, gates, the optimizer) is left out, as is custom for MFU, and so is
    what an implementation adds: attention computes whole blocks, about twice the keys seen, and the memory
    recomputes its forward in the backward. training: the backward of a product is two products, so 3 x forward.
    """
    model, memory, attention = config.model, config.memory, config.attention
    hidden, width = model.hidden_size, memory.heads * memory.head_dim
    inner = memory_flops(memory, model.seq_length) / model.seq_length
    gates = memory.gate_rank * (hidden + memory.heads * len(gate_starts(memory)))
    seen = min(attention.window, model.seq_length)
    keys = seen - seen * (seen - 1) / 2 / model.seq_length
    layer = {
        "M": 2 * (5 * hidden * width + gates + 3 * width * memory.conv_size) + inner,
        "*": attention.heads * attention.head_dim * (8 * hidden + 4 * keys),
        "-": 6 * hidden * model.ffn_hidden_size,
        "|": 0.0,
    }
    forward = sum(layer[symbol] for symbol in model.pattern) + 2 * hidden * model.vocab_size
    return Flops(forward, 3 * forward, 3 * inner * model.pattern.count("M"))


def memory_flops(memory: MemoryConfig, tokens: int) -> float:
    """Matrix-product FLOPs of one memory layer's inner loop over whole chunks of `tokens` tokens, forward.

    A chunk of C tokens has I = C + window - 1 sources, its own and its halo's; one head, matrices m x n:
    * the gradients' factors at the anchor: x W2^T, h W1^T, e W1 for each source (linear: x W^T);
    * the read of the chunk's start weights: 2 C m n a matrix;
    ns_steps = 0: the momentum coefficients, two products C x C x I (times theta, times alpha and eta); the read
    of the start momentum, 2 C m n, and of the sources, 2 C I (m + n); their sum into the next weights and the
    next momentum, 2 I m n each.
    ns_steps > 0, at K = C / ns_period writes: coefficients K x C x I; the momentum at each write, 2 I m n;
    Newton-Schulz; the read of the writes by the tokens from the first one on, 2 m n a pair, and their sum.
    """
    chunk, sources = memory.chunk, memory.chunk + memory.window - 1
    shapes = weight_shapes(memory)
    rows, cols = shapes[0]
    flops = 2.0 * sources * rows * cols * (1 if memory.memory == "linear" else 3)
    if memory.ns_steps == 0:
        flops += 4 * chunk * chunk * sources
    else:
        writes = chunk // memory.ns_period
        readers = chunk - memory.ns_period + 1
        flops += 2 * writes * chunk * sources
    for m, n in shapes:
        flops += 2 * chunk * m * n
        if memory.ns_steps == 0:
            flops += 2 * chunk * m * n + 2 * chunk * sources * (m + n) + 4 * sources * m * n
        else:
            flops += writes * (2 * sources * m * n + newton_schulz_flops(m, n, memory.ns_steps) + 2 * m * n)
            flops += 2 * writes * readers * (m * n + m)
    return flops * memory.heads * tokens / chunk


def newton_schulz_flops(m: int, n: int, steps: int) -> float:
    """NS of one m x n matrix as `atlas_kernels.newton_schulz` does it: on the Gram matrix where that is cheaper."""
    m, n = sorted((m, n))
    if 2 * n >= 3 * m:
        # X X^T and Q X; each step A A, P Q (but the first) and P A P (but the last).
        return 4.0 * m * m * n + (8 * steps - 6) * m**3
    return steps * (4.0 * m * m * n + 2 * m**3)
