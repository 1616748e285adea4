"""What every layer of the pattern owes the model: its call, and what is known of it before it is built.

Dims: B batch, T tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_atlas import AtlasConfig
from .place_atlas import TokenPositions


class Mixer(nn.Module):
    """One layer's way to look back. It is built from the configuration alone.

    A state is a tensor, or a tuple or frozen dataclass of states; every tensor in it lies batch first. Where no
    checkpoint gives a class its parameters, the method `start` does: tensors by the parameters' names.
    """

    section: ClassVar[str] = ""  # of the configuration, that its heads are in; empty: it has none
    states: ClassVar[tuple[type, ...]] = ()  # dataclasses of its state, which a file with a memory may name
    unrolled: ClassVar[bool] = True  # an exported graph unrolls it over the tokens, whose number is then fixed

    @classmethod
    def grows(cls, config: AtlasConfig) -> bool:
        """Whether its state grows with what was read."""
        return False

    @classmethod
    def alike(cls, config: AtlasConfig) -> str:
        """What keeps rows from standing at different positions; empty: nothing."""
        return ""

    def forward(self, x: Tensor, state: Any, place: TokenPositions) -> tuple[Tensor, Any]:
        """[B, T, hidden] and what it left before (None: nothing was read) -> [B, T, hidden], and the state after."""
        raise NotImplementedError


class SwiGLU(Mixer):
    """silu(gate) * up, projected back; the rows of `linear_gate_up` are all of gate, then all of up."""

    unrolled = False

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        self.linear_gate_up = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.linear_down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, state: None, place: TokenPositions) -> tuple[Tensor, None]:
        gate, up = self.linear_gate_up(x).chunk(2, -1)
        return self.linear_down(F.silu(gate) * up), None
