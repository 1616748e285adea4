"""Sequence mixers that fit the layer slots of Megatron-Core's HybridModel, by their symbol in `model.pattern`."""

from atlas_megatron.config import Layer, add_layer
from atlas_megatron.mixers.attention import FullAttention, SlidingWindowAttention
from atlas_megatron.mixers.base import Mixer
from atlas_megatron.mixers.costs import MLP, Costs
from atlas_megatron.mixers.delta import DeltaNet, GatedDeltaNet
from atlas_megatron.mixers.experts import Experts
from atlas_megatron.mixers.hybrid import MemoryAsContext, MemoryAsGate
from atlas_megatron.mixers.memory import AtlasMixer
from atlas_megatron.mixers.recurrent import GRU, LSTM

# What the layers cost that core builds, by their symbol.
CORES: dict[str, type[Costs]] = {"-": MLP, "E": Experts}
# The class behind each other symbol of `config.LAYERS`.
MIXERS: dict[str, type[Mixer]] = {
    "M": AtlasMixer,
    "*": SlidingWindowAttention,
    "F": FullAttention,
    "A": MemoryAsGate,
    "C": MemoryAsContext,
    "R": GRU,
    "L": LSTM,
    "D": DeltaNet,
    "G": GatedDeltaNet,
}


def register(symbol: str, mixer: type[Mixer], layer: Layer) -> None:
    """Make `symbol` stand for a mixer of your own: what the configuration knows of it, and its class.

    Call it before a configuration is read. Raises ValueError as `add_layer` does. What an exported model computes is
    registered with `atlas_megatron.hf.names.register`.
    """
    add_layer(symbol, layer)
    MIXERS[symbol] = mixer


def costs_of(symbol: str) -> type[Costs]:
    """The class that says what a layer costs."""
    return MIXERS.get(symbol) or CORES[symbol]
