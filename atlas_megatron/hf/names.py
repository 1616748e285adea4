"""Every parameter's name in a Megatron checkpoint and in an exported model.

Both hold the same numbers in the same layout: what tensor parallelism splits, a checkpoint describes whole, by head
first; a fused linear stays fused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers.initialization import no_init_weights

from atlas_megatron.hf.attention_atlas import FullAttention, WindowAttention
from atlas_megatron.hf.baselines_atlas import GRU, LSTM, DeltaNet, GatedDeltaNet
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.hybrid_atlas import MemoryAsContext, MemoryAsGate
from atlas_megatron.hf.memory_atlas import AtlasMemory
from atlas_megatron.hf.mixer_atlas import Mixer, SwiGLU
from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from atlas_megatron.hf.registry_atlas import MIXERS


@dataclass(frozen=True)
class Name:
    """One parameter: its two names and what its dimensions are."""

    megatron: str
    hf: str
    layout: str

    def within(self, megatron: str, hf: str) -> Name:
        return Name(f"{megatron}{self.megatron}", f"{hf}{self.hf}", self.layout)


EMBEDDING = Name("embedding.word_embeddings.weight", "model.embed_tokens.weight", "[vocabulary, hidden]")
FINAL_NORM = Name("decoder.final_norm.weight", "model.norm.weight", "[hidden]")
OUTPUT = Name("output_layer.weight", "lm_head.weight", "[vocabulary, hidden]")

# Of one layer, behind `decoder.layers.N.` and `model.layers.N.`.
MIXER_NORM = Name("norm.weight", "norm.weight", "[hidden]")
MEMORY = (
    Name("linear_qkvg.weight", "linear_qkvg.weight", "[heads x (q, k, v, gate) x K, hidden]"),
    Name("linear_gates.weight", "linear_gates.weight", "[heads x memories x gates, rank]"),
    Name("linear_out.weight", "linear_out.weight", "[hidden, heads x K]"),
    Name("gate_down", "gate_down", "[rank, hidden]"),
    Name("gate_bias", "gate_bias", "[heads, gates]"),
    Name("convolution", "convolution.weight", "[heads, (q, k, v) x K, taps]"),
    Name("coefficients", "coefficients", "[heads, degree + 1]"),
    Name("norm_gain", "norm_gain", "[heads, K]"),
    Name("branch_bias", "branch_bias", "[heads, K]"),
    Name("write_view", "write_view", "[heads, (key, value) x K]"),
    Name("start_first", "start_first", "[heads, V, F]"),
    Name("start_second", "start_second", "[heads, F, D]"),
    Name("start_gate", "start_gate", "[heads, F, D]"),
    Name("local_bias", "local_bias", "[heads, local memories, gates]"),
    Name("local_view", "local_view", "[heads, local memories, (key, value) x K]"),
    Name("local_first", "local_first", "[heads, local memories, V, F]"),
    Name("local_second", "local_second", "[heads, local memories, F, D]"),
    Name("local_gate", "local_gate", "[heads, local memories, F, D]"),
)
ATTENTION = (
    Name("linear_qkv.weight", "linear_qkv.weight", "[heads x (q, k, v) x K, hidden]"),
    Name("linear_out.weight", "linear_out.weight", "[hidden, heads x K]"),
    Name("persistent", "persistent", "[heads, (key, value), tokens, K]"),
)
JOINED = (
    *(name.within("memory.", "memory.") for name in MEMORY),
    *(name.within("attention.", "attention.") for name in ATTENTION),
    Name("memory_gain", "memory_gain", "[hidden]"),
    Name("attention_gain", "attention_gain", "[hidden]"),
)
CONTEXT = (
    Name("linear_query.weight", "linear_query.weight", "[heads x K, hidden]"),
    Name("linear_read.weight", "linear_read.weight", "[hidden, heads x K]"),
    Name("read_gain", "read_gain", "[heads, K]"),
)
RECURRENT = (
    Name("linear_in.weight", "linear_in.weight", "[heads x (gates, output gate) x K, hidden]"),
    Name("linear_out.weight", "linear_out.weight", "[hidden, heads x K]"),
    Name("recurrence", "recurrence", "[heads, gates, K, K]"),
    Name("bias", "bias", "[heads, biases, K]"),
)
DELTA = (
    Name("linear_qkvg.weight", "linear_qkvg.weight", "[heads x (q, k, v, gate) x K, hidden]"),
    Name("linear_gates.weight", "linear_gates.weight", "[heads x gates, hidden]"),
    Name("linear_out.weight", "linear_out.weight", "[hidden, heads x K]"),
    Name("convolution", "convolution.weight", "[heads, (q, k, v) x K, taps]"),
    Name("norm_gain", "norm_gain", "[heads, K]"),
    Name("branch_bias", "branch_bias", "[heads, K]"),
)
DECAY = (
    Name("decay_rate_log", "decay_rate_log", "[heads]"),
    Name("decay_bias", "decay_bias", "[heads]"),
)
MLP = (
    Name("pre_mlp_layernorm.weight", "norm.weight", "[hidden]"),
    Name("mlp.linear_fc1.weight", "mixer.linear_gate_up.weight", "[(gate, up) x ffn, hidden]"),
    Name("mlp.linear_fc2.weight", "mixer.linear_down.weight", "[hidden, ffn]"),
)


def of_mixer(names: Iterable[Name]) -> tuple[Name, ...]:
    """All of a layer whose mixer has these: the norm before it, and they."""
    return (MIXER_NORM, *(name.within("mixer.", "mixer.") for name in names))


LAYERS: dict[type[Mixer], tuple[Name, ...]] = {
    AtlasMemory: of_mixer(MEMORY),
    WindowAttention: of_mixer(ATTENTION),
    FullAttention: of_mixer(ATTENTION),
    MemoryAsGate: of_mixer(JOINED),
    MemoryAsContext: of_mixer((*JOINED, *CONTEXT)),
    GRU: of_mixer(RECURRENT),
    LSTM: of_mixer(RECURRENT),
    DeltaNet: of_mixer(DELTA),
    GatedDeltaNet: of_mixer((*DELTA, *DECAY)),
    SwiGLU: MLP,
}


def register(symbol: str, twin: type[Mixer], names: Iterable[Name]) -> None:
    """Make `symbol` stand for this layer of an exported model; names: of the parameters of its mixer, in both models.

    The twin's file travels with every export whose pattern holds the symbol. Raises ValueError for a symbol that is
    taken.
    """
    if symbol in MIXERS:
        raise ValueError(f"symbol={symbol!r} is taken by {MIXERS[symbol].__name__}; choose another one")
    MIXERS[symbol] = twin
    LAYERS[twin] = of_mixer(names)


def names_of(config: AtlasConfig) -> list[Name]:
    """Every parameter that a model of this pattern may have, in its order; some only under some settings."""
    names = [EMBEDDING]
    for number, symbol in enumerate(config.pattern):
        own = LAYERS[MIXERS[symbol]]
        names += [name.within(f"decoder.layers.{number}.", f"model.layers.{number}.") for name in own]
    return [*names, FINAL_NORM] + ([] if config.tied_embeddings else [OUTPUT])


def parameters_of(config: AtlasConfig) -> list[tuple[Name, tuple[int, ...]]]:
    """Every parameter that a model of this configuration has, with its shape, in the order of its layers."""
    with no_init_weights(), torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in AtlasForCausalLM(config).named_parameters()}
    return [(name, shapes[name.hf]) for name in names_of(config) if name.hf in shapes]
