"""A mixer from outside: a moving average of the tokens before, whose channels learn how fast they forget.

    h_t = a h_{t-1} + (1 - a) x_t,   a = sigmoid(decay),   h_0 = 0

Dims: B batch, T tokens, H heads of this tensor-parallel rank, K head size. docs/extending.md walks through this file.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from atlas_kernels import at_least_float32
from atlas_megatron import mixers
from atlas_megatron.config import Config, Layer
from atlas_megatron.mixers.base import Mixer
from atlas_megatron.mixers.costs import FLOAT
from atlas_megatron.mixers.linears import MixerLinears
from atlas_megatron.train import main

AVERAGE = Layer("moving average", ("recurrent",), packs=False)


class MovingAverage(Mixer):
    """Heads of [recurrent], each channel of which is an average of its own; split along heads."""

    def build(self, settings: Config, linears: MixerLinears, groups: ProcessGroupCollection) -> None:
        recurrent, hidden = settings.recurrent, settings.model.hidden_size
        self.head_dim = recurrent.head_dim
        width = recurrent.heads * recurrent.head_dim
        self.linear_in = linears.column(hidden, width, self.config, self.tp_group)
        self.linear_out = linears.row(width, hidden, self.config, self.tp_group)
        self.decay = self.by_head(torch.zeros(recurrent.heads, recurrent.head_dim))

    def mix(
        self, hidden_states: Tensor, state: Tensor | None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self.linear_in(hidden_states)[0].unflatten(-1, (-1, self.head_dim))  # [T, B, H, K]
        average = at_least_float32(x.new_zeros(x.shape[1:])) if state is None else state
        chain, kept, averages = self.shards.tokens, at_least_float32(self.decay).sigmoid(), []
        if chain.rank > 0:
            (average,) = chain.receive((average,), x)
        for token in at_least_float32(x):
            average = torch.lerp(token, average, kept)
            averages.append(average)
        y = chain.pass_on(torch.stack(averages), (average,))
        return self.linear_out(y.to(x.dtype).flatten(2))[0], average

    @classmethod
    def num_params(cls, settings: Config) -> int:
        """The two linears, and a decay for each channel."""
        width = cls.state_size(settings)
        return 2 * settings.model.hidden_size * width + width

    @classmethod
    def flops_per_token(cls, settings: Config) -> tuple[float, float]:
        """The two linears: two FLOPs a multiply-add; nothing is learned at test time."""
        return 4.0 * settings.model.hidden_size * cls.state_size(settings), 0.0

    @classmethod
    def activation_bytes(cls, settings: Config, size: int) -> float:
        """x and the averages, in float32 and in the model's dtype."""
        return 2 * cls.state_size(settings) * (size + FLOAT) / settings.parallel.tensor

    @classmethod
    def state_numbers(cls, settings: Config, position: int) -> int:
        return cls.state_size(settings)

    @classmethod
    def state_size(cls, settings: Config) -> int:
        return settings.recurrent.heads * settings.recurrent.head_dim


def train(rank: int, words: list[str]) -> None:
    """In a process that does not know it yet: what a script of one's own does."""
    mixers.register("T", MovingAverage, AVERAGE)
    assert main(words) == 0
