"""Baselines: GRU (`R`), LSTM (`L`), DeltaNet (`D`) and Gated DeltaNet (`G`).

Dims: B batch, T tokens, H heads, K = V head size, G gates of a cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_atlas import AtlasConfig
from .convolution_atlas import ShortConvolution, edge_starts, wide
from .kernels_atlas import Gates, MemoryRule, MemoryState, State, gated_norm, omega_memory, unrounded
from .mixer_atlas import Mixer
from .place_atlas import Place

# Of a head: one for each gate, and the GRU's inside its reset.
BIASES = 4
DELTA_RULE = MemoryRule(memory="linear", window=1, chunk=1, momentum=False, ns_steps=0)
# What a decay of e^-30 leaves is below the last digit of float32; a smaller one is taken as this.
LEAST_LOG_DECAY = -30.0
# Start ranges of Gated DeltaNet's decay exp(-rate x step), those of Mamba2.
RATES = (1.0, 16.0)
STEPS = (0.001, 0.1)


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
        self.bias = nn.Parameter(torch.empty(heads, BIASES, self.head_dim))

    def start(self) -> dict[str, Tensor]:
        heads, gates, size, _ = self.recurrence.shape
        # Orthogonal: a product of many of them neither grows nor shrinks.
        drawn = [nn.init.orthogonal_(torch.empty(size, size)) for _ in range(heads * gates)]
        # The second gate is the one that keeps: it starts at 0.73, so that what is remembered outlives a few tokens.
        bias = torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None].expand(self.bias.shape)
        return {"recurrence": torch.stack(drawn).unflatten(0, (heads, gates)), "bias": bias.clone()}

    def cell(self, x: Tensor, carried: tuple[Tensor, ...], matrix: Tensor, inner: Tensor) -> tuple[Tensor, ...]:
        """One token: x [H, B, G K], biased, matrix [H, K, G K], inner [H, 1, (4-G) K], the biases that x has not yet
        -> what is carried after it, [H, B, K] each."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: RecurrentState | None, place: Place) -> tuple[Tensor, RecurrentState]:
        """[B, T, hidden] -> [B, T, hidden] and the state after."""
        projected = self.linear_in(x).unflatten(-1, (-1, self.gates + 1, self.head_dim))
        inputs, branch = projected.split((self.gates, 1), dim=-2)
        outer, inner = wide(self.bias).split((self.gates, BIASES - self.gates), 1)
        inputs = (wide(inputs) + outer).flatten(3).permute(1, 2, 0, 3)  # [T, H, B, G K]
        matrix, inner = wide(self.recurrence).flatten(1, 2).mT.contiguous(), inner.flatten(1).unsqueeze(1)
        if state is None:
            carried = (inputs.new_zeros(*inputs.shape[1:3], self.head_dim),) * self.carries
        else:
            carried = tuple(t.transpose(0, 1) for t in state.carried)
        documents, outputs = place.documents, []
        for t, token in enumerate(inputs.unbind(0)):
            if documents is not None:
                # Where a document begins, nothing is remembered.
                kept = (documents[:, t] != 0).to(token.dtype)[None, :, None]
                carried = tuple(kept * remembered for remembered in carried)
            with unrounded(x):
                carried = self.cell(token, carried, matrix, inner)
            outputs.append(carried[0])
        y = torch.stack(outputs).permute(2, 0, 1, 3)  # [B, T, H, K]
        y = y.to(branch.dtype) * F.silu(branch.squeeze(-2))
        after = RecurrentState(tuple(remembered.transpose(0, 1) for remembered in carried))
        return self.linear_out(y.flatten(2)), after


class GRU(Recurrent):
    """h_t = z h_{t-1} + (1 - z) n;  r, z = sigmoid(x + R h_{t-1});  n = tanh(x_n + r (R_n h_{t-1} + inner)), in the
    order r, z, n."""

    gates = 3
    carries = 1

    def cell(self, x: Tensor, carried: tuple[Tensor, ...], matrix: Tensor, inner: Tensor) -> tuple[Tensor, ...]:
        (h,) = carried
        sizes = (2 * self.head_dim, self.head_dim)
        (x_gates, x_n), (h_gates, h_n) = x.split(sizes, -1), torch.bmm(h, matrix).split(sizes, -1)
        r, z = (x_gates + h_gates).sigmoid().chunk(2, -1)
        n = torch.addcmul(x_n, r, h_n + inner).tanh()
        return (torch.lerp(n, h, z),)


class LSTM(Recurrent):
    """c_t = f c_{t-1} + i g;  h_t = o tanh(c_t);  i, f, o = sigmoid and g = tanh of x + R h_{t-1}, in the order
    i, f, g, o."""

    gates = 4
    carries = 2

    def cell(self, x: Tensor, carried: tuple[Tensor, ...], matrix: Tensor, inner: Tensor) -> tuple[Tensor, ...]:
        h, c = carried
        i, f, g, o = torch.baddbmm(x, h, matrix).chunk(4, -1)
        c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
        return o.sigmoid() * c.tanh(), c


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

    def forward(self, x: Tensor, state: DeltaState | None, place: Place) -> tuple[Tensor, DeltaState]:
        """[B, T, hidden] -> [B, T, hidden] and the state after."""
        qkv, branch = self.linear_qkvg(x).unflatten(-1, (-1, 4, self.head_dim)).split((3, 1), dim=-2)
        held, tail = (state.memory, state.tail) if state else (None, None)
        q, k, v, tail = self.convolution(qkv, tail, place.documents)
        logits = wide(self.linear_gates(x)).unflatten(-1, (-1, self.gates))
        step, log_alpha = logits[..., 0].sigmoid(), self.log_decay(logits)
        one = alpha = torch.ones_like(step)
        if log_alpha is not None:
            # The kernel steps before it decays: its eta and v are those whose product is beta v after the decay.
            alpha = log_alpha.exp()
            step, v = alpha * step, v * log_alpha.neg().exp().unsqueeze(-1)
        gates = Gates(alpha=alpha, eta=step, theta=torch.zeros_like(one), gamma=one)
        empty = v.new_zeros(self.heads, self.head_dim, self.head_dim)
        with unrounded(x):
            y, after = omega_memory(q, k, v, gates, (empty,), DELTA_RULE, state=held, positions=place.documents)
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
        low, high = (math.log(step) for step in STEPS)
        step = torch.empty(self.heads).uniform_(low, high).exp()
        rate = torch.empty(self.heads).uniform_(*RATES)
        # softplus(bias) = step
        return super().start() | {"decay_rate_log": rate.log(), "decay_bias": step.expm1().log()}

    def log_decay(self, logits: Tensor) -> Tensor | None:
        step = F.softplus(logits[..., 1] + wide(self.decay_bias))
        return (-wide(self.decay_rate_log).exp() * step).clamp(min=LEAST_LOG_DECAY)
