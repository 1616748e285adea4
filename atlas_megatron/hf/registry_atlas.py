"""The class behind each symbol of the pattern. An export adds those that its model was trained with from outside."""

from __future__ import annotations

from .attention_atlas import FullAttention, WindowAttention
from .baselines_atlas import GRU, LSTM, DeltaNet, GatedDeltaNet
from .hybrid_atlas import MemoryAsContext, MemoryAsGate
from .memory_atlas import AtlasMemory
from .mixer_atlas import Mixer, SwiGLU

MIXERS: dict[str, type[Mixer]] = {
    "M": AtlasMemory,
    "*": WindowAttention,
    "F": FullAttention,
    "A": MemoryAsGate,
    "C": MemoryAsContext,
    "R": GRU,
    "L": LSTM,
    "D": DeltaNet,
    "G": GatedDeltaNet,
    "-": SwiGLU,
}
