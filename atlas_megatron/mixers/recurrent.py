"""Recurrent baselines: GRU (`R`) and LSTM (`L`), one recurrence a head.

Dims: B batch, T tokens, H heads of this tensor-parallel rank, K head size, G gates.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from atlas_kernels.cells import (
    BIASES,
    Carried,
    cell_inputs,
    gru_cell,
    initial_cell_bias,
    initial_recurrence,
    lstm_cell,
    run_cell,
)
from atlas_megatron.config import Config
from atlas_megatron.mixers.base import Mixer
from atlas_megatron.mixers.costs import FLOAT, Matrix
from atlas_megatron.mixers.linears import MixerLinears


class Recurrent(Mixer):
    """Heads that each run a recurrence of their own, an output gate, and the projections around them.

    The recurrent matrices of all heads together are one block-diagonal matrix of a wide cell. A row of `linear_in`
    belongs to one head, whose G inputs and output gate lie together, so that a shard is whole heads.
    """

    gates: ClassVar[int]  # inputs of a cell
    carries: ClassVar[int]  # tensors of a cell's state

    def build(self, settings: Config, linears: MixerLinears, groups: ProcessGroupCollection) -> None:
        recurrent, hidden = settings.recurrent, settings.model.hidden_size
        heads, self.head_dim = recurrent.heads, recurrent.head_dim
        width = heads * self.head_dim
        self.linear_in = linears.column(hidden, (self.gates + 1) * width, self.config, self.tp_group)
        self.linear_out = linears.row(width, hidden, self.config, self.tp_group)
        self.recurrence = self.by_head(initial_recurrence(heads, self.gates, self.head_dim))
        self.bias = self.by_head(initial_cell_bias(heads, self.head_dim))
        self.bias.no_weight_decay = True  # type: ignore[attr-defined]

    @staticmethod
    def cell(x: Tensor, carried: Carried, matrix: Tensor, inner: Tensor) -> Carried:
        """One token, as `gru_cell` says."""
        raise NotImplementedError

    @classmethod
    def num_params(cls, settings: Config) -> int:
        recurrent = settings.recurrent
        width = recurrent.heads * recurrent.head_dim
        return width * ((cls.gates + 2) * settings.model.hidden_size + cls.gates * recurrent.head_dim + BIASES)

    @classmethod
    def matrices(cls, settings: Config) -> tuple[Matrix, ...]:
        """The way in, its gates apart, and the way out; recurrent products are no linears."""
        recurrent, hidden = settings.recurrent, settings.model.hidden_size
        width, parts = recurrent.heads * recurrent.head_dim, cls.gates + 1
        way_in = Matrix("linear_in.weight", parts * width, hidden, 0, (recurrent.head_dim,) * parts)
        return way_in, Matrix("linear_out.weight", hidden, width, 1)

    @classmethod
    def flops_per_token(cls, settings: Config) -> tuple[float, float]:
        """The projections to the gates' inputs and the output gate, the recurrent products, the output projection."""
        recurrent = settings.recurrent
        width = recurrent.heads * recurrent.head_dim
        return 2.0 * width * ((cls.gates + 2) * settings.model.hidden_size + cls.gates * recurrent.head_dim), 0.0

    @classmethod
    def scan_flops(cls, settings: Config) -> float:
        """The recurrent products."""
        recurrent = settings.recurrent
        return 2.0 * recurrent.heads * recurrent.head_dim**2 * cls.gates

    @classmethod
    def state_numbers(cls, settings: Config, position: int) -> int:
        return settings.recurrent.heads * settings.recurrent.head_dim * cls.carries

    @classmethod
    def state_size(cls, settings: Config) -> int:
        return settings.recurrent.heads * settings.recurrent.head_dim * cls.carries

    @classmethod
    def activation_bytes(cls, settings: Config, size: int) -> float:
        """The output gate's branch; in float32 what each token's cell computes, its gates and three states."""
        recurrent = settings.recurrent
        width = recurrent.heads * recurrent.head_dim
        return width * (3 * size + (cls.gates + 3) * FLOAT) / settings.parallel.tensor

    def mix(
        self, hidden_states: Tensor, state: Carried | None, positions: Tensor | None = None
    ) -> tuple[Tensor, Carried]:
        projected = self.linear_in(hidden_states)[0].unflatten(-1, (-1, self.gates + 1, self.head_dim))
        inputs, branch = projected.split((self.gates, 1), dim=-2)
        x, matrix, inner = cell_inputs(inputs, self.bias, self.recurrence)
        start = x.new_zeros(*x.shape[1:3], self.head_dim)
        # Heads lead inside, as in the products; a state lies batch first, as every layer's does.
        carried = tuple(t.transpose(0, 1) for t in state) if state else (start,) * self.carries
        chain = self.shards.tokens
        if chain.rank > 0:
            carried = chain.receive(carried, x)
        y, carried = run_cell(self.cell, x, carried, matrix, inner, positions)
        y = chain.pass_on(y, carried)
        y = y.to(branch.dtype) * F.silu(branch.squeeze(-2))
        return self.linear_out(y.flatten(2))[0], tuple(t.transpose(0, 1) for t in carried)


class GRU(Recurrent):
    """The heads of `gru_cell`."""

    gates = 3
    carries = 1
    cell = staticmethod(gru_cell)


class LSTM(Recurrent):
    """The heads of `lstm_cell`."""

    gates = 4
    carries = 2
    cell = staticmethod(lstm_cell)
