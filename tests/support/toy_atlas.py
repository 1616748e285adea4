"""The moving average of toy_mixer.py as a layer of an exported model, in whose folder this file lies then."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

try:
    from .mixer_atlas import Mixer  # beside it in an exported folder
except ImportError:
    from atlas_megatron.hf.mixer_atlas import Mixer


class MovingAverage(Mixer):
    """h_t = a h_{t-1} + (1 - a) x_t, a = sigmoid(decay)."""

    section = "recurrent"

    def __init__(self, config: Any) -> None:
        super().__init__()
        recurrent = config.section("recurrent")
        self.head_dim = recurrent.head_dim
        width = recurrent.heads * recurrent.head_dim
        self.linear_in = nn.Linear(config.hidden_size, width, bias=False)
        self.linear_out = nn.Linear(width, config.hidden_size, bias=False)
        self.decay = nn.Parameter(torch.empty(recurrent.heads, recurrent.head_dim))

    @classmethod
    def alike(cls, config: Any) -> str:
        return "moving averages, which do not tell documents and padding from text"

    def start(self) -> dict[str, Tensor]:
        return {"decay": torch.zeros(self.decay.shape)}

    def forward(self, x: Tensor, state: Tensor | None, place: Any) -> tuple[Tensor, Tensor]:
        """[B, T, hidden] -> [B, T, hidden] and the average after, [B, H, K]."""
        x = self.linear_in(x).unflatten(-1, (-1, self.head_dim))
        average = x.new_zeros(x[:, 0].shape).float() if state is None else state
        kept, averages = self.decay.float().sigmoid(), []
        for token in x.float().unbind(1):
            average = torch.lerp(token, average, kept)
            averages.append(average)
        return self.linear_out(torch.stack(averages, 1).to(x.dtype).flatten(2)), average
