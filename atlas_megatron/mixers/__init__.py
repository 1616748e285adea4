"""Sequence mixers that fit the layer slots of Megatron-Core's HybridModel, by their symbol in `model.pattern`."""

from atlas_megatron.mixers.attention import FullAttention, SlidingWindowAttention
from atlas_megatron.mixers.base import Mixer
from atlas_megatron.mixers.delta import DeltaNet, GatedDeltaNet
from atlas_megatron.mixers.hybrid import MemoryAsContext, MemoryAsGate
from atlas_megatron.mixers.memory import AtlasMixer
from atlas_megatron.mixers.recurrent import GRU, LSTM

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
