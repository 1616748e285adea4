"""Baselines: GRU (`R`), LSTM (`L`), DeltaNet (`D`) and Gated DeltaNet (`G`).

Dims: B batch, T tokens, H heads, K = V head size, G gates of a cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_atlas import AtlasConfig
from .convolution_atlas import ShortConvolution, edge_starts
from .kernels_atlas import (
    MemoryState,
    State,
    at_least_float32,
    cells,
    gated_delta,
    gated_delta_rule,
    gated_norm,
    unrounded,
)
from .mixer_atlas import Mixer
from .place_atlas import TokenPositions


@dataclass(frozen=True)
class RecurrentState:
    """What a head remembers between two tokens, [B, H, K] each, at least float32; its output first."""

    carried: tuple[Tensor, ...]


class Recurrent(Mixer):
    """Heads that each run a recurrence of their own, an output gate, and the projections around them.

    A row of `linear_in` belongs to one head, whose G inputs and output gate lie together.
    """

    section = "recurrent"
    states = (RecurrentState,)
    gates: ClassVar[int]  # inputs of a cell
    carries: ClassVar[int]  # tensors of a cell's state

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        recurrent = config.section("recurrent")
        heads, self.head_dim = recurrent.heads, recurrent.head_dim
        width = heads * self.head_dim
        self.linear_in = nn.Linear(config.hidden_size, (self.gates + 1) * width, bias=False)
        self.linear_out = nn.Linear(width, config.hidden_size, bias=False)
        self.recurrence = nn.Parameter(torch.empty(heads, self.gates, self.head_dim, self.head_dim))
        self.bias = nn.Parameter(torch.empty(heads, cells.BIASES, self.head_dim))

    def start(self) -> dict[str, Tensor]:
        heads, gates, size, _ = self.recurrence.shape
        recurrence, bias = cells.initial_recurrence(heads, gates, size), cells.initial_cell_bias(heads, size)
        return {"recurrence": recurrence, "bias": bias}

    @staticmethod
    def cell(x: Tensor, carried: cells.Carried, matrix: Tensor, inner: Tensor) -> cells.Carried:
        """One token, as `gru_cell` says."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: RecurrentState | None, place: TokenPositions) -> tuple[Tensor, RecurrentState]:
        """[B, T, hidden] -> [B, T, hidden] and the state after."""
        projected = self.linear_in(x).unflatten(-1, (-1, self.gates + 1, self.head_dim))
        inputs, branch = projected.split((self.gates, 1), dim=-2)
        inputs, matrix, inner = cells.cell_inputs(inputs.transpose(0, 1), self.bias, self.recurrence)
        if state is None:
            carried = (inputs.new_zeros(*inputs.shape[1:3], self.head_dim),) * self.carries
        else:
            carried = tuple(t.transpose(0, 1) for t in state.carried)
        with unrounded(x):
            y, carried = cells.run_cell(self.cell, inputs, carried, matrix, inner, place.documents)
        y = y.transpose(0, 1).to(branch.dtype) * F.silu(branch.squeeze(-2))
        after = RecurrentState(tuple(remembered.transpose(0, 1) for remembered in carried))
        return self.linear_out(y.flatten(2)), after


class GRU(Recurrent):
    """The heads of `gru_cell`."""

    gates = 3
    carries = 1
    cell = staticmethod(cells.gru_cell)


class LSTM(Recurrent):
    """The heads of `lstm_cell`."""

    gates = 4
    carries = 2
    cell = staticmethod(cells.lstm_cell)


@dataclass(frozen=True)
class DeltaState:
    """What a layer carries over a cut: the memory, and the convolutions' tail."""

    memory: State
    tail: Tensor


class DeltaNet(Mixer):
    """S_t = S_{t-1} - beta_t (S_{t-1} k_t - v_t) k_t^T, y_t = S_t q_t. A row of `linear_qkvg` belongs to one head."""

    section = "delta"
    states = (DeltaState, MemoryState)
    gates: ClassVar[int] = 1  # beta

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__()
        delta, hidden = config.section("delta"), config.hidden_size
        self.heads, self.head_dim, self.epsilon = delta.heads, delta.head_dim, config.norm_epsilon
        self.delta = delta
        width = delta.heads * delta.head_dim
        self.linear_qkvg = nn.Linear(hidden, 4 * width, bias=False)
        self.linear_gates = nn.Linear(hidden, delta.heads * self.gates, bias=False)
        self.linear_out = nn.Linear(width, hidden, bias=False)
        self.convolution = ShortConvolution(delta.heads, delta.head_dim, delta.conv_size)
        self.norm_gain = nn.Parameter(torch.empty(delta.heads, delta.head_dim))
        self.branch_bias = nn.Parameter(torch.empty(delta.heads, delta.head_dim)) if delta.open_gate else None

    def start(self) -> dict[str, Tensor]:
        own = edge_starts(self.delta, self.linear_qkvg, self.convolution)
        return {"norm_gain": torch.ones(self.norm_gain.shape), **own}

    def forward(self, x: Tensor, state: DeltaState | None, place: TokenPositions) -> tuple[Tensor, DeltaState]:
        """[B, T, hidden] -> [B, T, hidden] and the state after."""
        qkv, branch = self.linear_qkvg(x).unflatten(-1, (-1, 4, self.head_dim)).split((3, 1), dim=-2)
        held, tail = (state.memory, state.tail) if state else (None, None)
        q, k, v, tail = self.convolution(qkv, tail, place.documents)
        logits = at_least_float32(self.linear_gates(x)).unflatten(-1, (-1, self.gates))
        beta, log_alpha = logits[..., 0].sigmoid(), self.log_decay(logits)
        with unrounded(x):
            y, after = gated_delta_rule(q, k, v, beta, log_alpha, place.documents, held)
            branch = branch.squeeze(-2) if self.branch_bias is None else branch.squeeze(-2) + self.branch_bias
            y = gated_norm(y, branch, self.norm_gain, self.epsilon)
        return self.linear_out(y.flatten(2)), DeltaState(after, tail)

    def log_decay(self, logits: Tensor) -> Tensor | None:
        """log alpha [B, T, H] from the gates' logits [B, T, H, gates]; None: nothing decays."""
        return None


class GatedDeltaNet(DeltaNet):
    """DeltaNet whose memory decays before each step, alpha = exp(-rate softplus(a + bias))."""

    gates = 2  # beta, a

    def __init__(self, config: AtlasConfig) -> None:
        super().__init__(config)
        self.decay_rate_log = nn.Parameter(torch.empty(self.heads))
        self.decay_bias = nn.Parameter(torch.empty(self.heads))

    def start(self) -> dict[str, Tensor]:
        rate_log, bias = gated_delta.initial_decay(self.heads)
        return super().start() | {"decay_rate_log": rate_log, "decay_bias": bias}

    def log_decay(self, logits: Tensor) -> Tensor | None:
        return gated_delta.log_decay(logits[..., 1], self.decay_rate_log, self.decay_bias)
