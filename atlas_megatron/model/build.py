"""From a Config to core's HybridModel, and what that model costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from atlas_megatron.config import Config, TrainConfig, layers_of
from atlas_megatron.config.layers import EXPERTS
from atlas_megatron.mixers import costs_of
from atlas_megatron.model.layer_specs import core_pattern, stack_spec
from atlas_megatron.parallel import world
from atlas_megatron.parallel.device import device


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
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        # Of two pipeline ranks each is the other's next and previous one: batched, core cannot tell these apart.
        overlap_p2p_comm=parallel.virtual > 1,
        batch_p2p_comm=parallel.virtual == 1,
        context_parallel_size=parallel.context,
        # Drawn whole on the CPU, and cut: the start does not depend on the tensor-parallel size, nor on the device.
        use_cpu_initialization=True,
        embedding_init_method=partial(_draw_embedding, config),
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=on_gpu and _grad_accum_fusion_available,  # Apex's CUDA extension
        fp8=config.train.fp8 or None,
        fp8_recipe=config.train.fp8_recipe,
        # Of the delayed recipe: the largest of many steps, as Transformer Engine itself has it.
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        deterministic_mode=config.train.deterministic,
        cuda_graph_impl="full_iteration" if config.train.cuda_graph else "none",
        **_recomputed(config.train),
        **_experts(config),
    )


def _experts(config: Config) -> dict[str, Any]:
    """What core is told of E layers, where there are any."""
    experts = config.experts
    if EXPERTS not in config.model.pattern:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_router_topk": experts.top_k,
        # Of a single expert the softmax over the chosen ones is one, which would teach the router nothing.
        "moe_router_pre_softmax": experts.top_k == 1,
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": config.train.aux_loss,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": config.model.transformer_engine,
        "expert_model_parallel_size": config.parallel.expert,
        "expert_tensor_parallel_size": 1,
    }


def _recomputed(train: TrainConfig) -> dict[str, Any]:
    """What core is told of `train.recompute` and its keys."""
    if train.recompute_modules:
        return {"recompute_granularity": "selective", "recompute_modules": list(train.recompute_modules)}
    if not train.recompute:
        return {}
    method, layers = ("block", train.recompute_layers) if train.recompute_layers else ("uniform", 1)
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}


def _draw_embedding(config: Config, weight: Tensor) -> Tensor:
    with world.own_stream(config.run.seed, "embedding"):
        return weight.normal_(std=config.model.init_std)


def build_model(
    config: Config,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    pg_collection: ProcessGroupCollection | None = None,
    vp_stage: int | None = None,
) -> HybridModel:
    """The model, or this rank's shard and pipeline stage of it, on this rank's device.

    torch.distributed, parallel_state and the model-parallel seed must be set, and `config` validated. pre_process:
    with the embedding; post_process: with the final norm and the output layer. Embedding, output layer and each layer
    draw from streams of their own, by config.run.seed: every layout starts from the same weights, to the bit.
    """
    with world.own_stream(config.run.seed, "output layer"):
        model = HybridModel(
            config=transformer_config(config),
            hybrid_stack_spec=stack_spec(config),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.model.seq_length,
            hybrid_layer_pattern=core_pattern(config),
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=config.model.tied_embeddings,
            position_embedding_type="none",
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
    return model.to(device())


def build_chunks(config: Config) -> list[HybridModel]:
    """This rank's stages of the pipeline, as `build_model` makes them: one, or `parallel.virtual` of them."""
    virtual = config.parallel.virtual
    return [
        build_model(
            config,
            pre_process=parallel_state.is_pipeline_first_stage() and chunk == 0,
            post_process=parallel_state.is_pipeline_last_stage() and chunk == virtual - 1,
            vp_stage=chunk if virtual > 1 else None,
        )
        for chunk in range(virtual)
    ]


def num_params(config: Config) -> int:
    """Parameters of the whole model, over all ranks; tied embeddings count once."""
    model = config.model
    embeddings = (1 if model.tied_embeddings else 2) * model.vocab_size * model.hidden_size
    layers = sum(costs_of(symbol).num_params(config) for symbol in layers_of(config))
    norms = (len(layers_of(config)) + 1) * model.hidden_size
    return embeddings + layers + norms


def active_params(config: Config) -> int:
    """Those of `num_params` that a token meets: of E layers, the experts that the router chooses for it."""
    return num_params(config) - sum(costs_of(symbol).idle_params(config) for symbol in layers_of(config))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations a token, over all ranks."""

    forward: float
    training: float
    inner: float  # the part of `training` that the memories spend on learning at test time and on being read


def flops_per_token(config: Config) -> Flops:
    """Matrix-product FLOPs of one token of a sequence of `seq_length`, two a multiply-add.

    Linears, in x out: 2 in out. Mixers: as each says of itself. MLP: three products with ffn_hidden_size. E: the
    experts that a token is sent to. Then the logits. Elementwise work (norms, activations, gates, the optimizer) is
    left out, as is custom for MFU, and so is what an implementation adds: attention computes whole blocks, about twice
    the keys seen, and the memory recomputes its forward in the backward. training: the backward of a product is two
    products, so 3 x forward; with memory.anchor_gradient = 0 one for those with the weights at which the memory takes
    its gradients.
    """
    model = config.model
    costs = [costs_of(symbol) for symbol in layers_of(config)]
    layers = [cost.flops_per_token(config) for cost in costs]
    forward = sum(whole for whole, _ in layers) + 2 * model.hidden_size * model.vocab_size
    constant = sum(cost.constant_flops(config) for cost in costs) / model.seq_length
    return Flops(forward, 3 * forward - constant, 3 * sum(inner for _, inner in layers) - constant)
