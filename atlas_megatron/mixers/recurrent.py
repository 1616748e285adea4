"""Recurrent baselines: GRU (`R`, arXiv 1406.1078, in cuDNN's form) and LSTM (`L`), one recurrence a head.

Dims: B batch, T tokens, H heads of this tensor-parallel rank, K head size, G gates.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from atlas_megatron.config import Config
from atlas_megatron.mixers.base import Mixer, wide
from atlas_megatron.mixers.costs import FLOAT
from atlas_megatron.mixers.linears import MixerLinears

# What a head remembers between two tokens, [H, B, K] each, at least float32; its output first.
Carried = tuple[Tensor, ...]
# Of a head: one for each gate, and the GRU's inside its reset.
BIASES = 4


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
        # Orthogonal: a product of many of them neither grows nor shrinks.
        drawn = [nn.init.orthogonal_(torch.empty(self.head_dim, self.head_dim)) for _ in range(heads * self.gates)]
        self.recurrence = self.by_head(torch.stack(drawn).unflatten(0, (heads, self.gates)))
        # The second gate is the one that keeps: it starts at 0.73 (Jozefowicz et al., 2015), so that what is
        # remembered, and its gradient, outlives a few tokens.
        start = torch.tensor([0.0, 1.0, 0.0, 0.0])[:, None].expand(BIASES, self.head_dim)
        self.bias = self.by_head(start.repeat(heads, 1, 1))
        self.bias.no_weight_decay = True  # type: ignore[attr-defined]

    def cell(self, x: Tensor, carried: Carried, matrix: Tensor, inner: Tensor) -> Carried:
        """One token: x [H, B, G K], biased, matrix [H, K, G K], inner [H, 1, (4-G) K], the biases that x has not yet
        -> what is carried after it."""
        raise NotImplementedError

    @classmethod
    def num_params(cls, settings: Config) -> int:
        recurrent = settings.recurrent
        width = recurrent.heads * recurrent.head_dim
        return width * ((cls.gates + 2) * settings.model.hidden_size + cls.gates * recurrent.head_dim + BIASES)

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
        outer, inner = wide(self.bias).split((self.gates, BIASES - self.gates), 1)
        inputs = (wide(inputs) + outer).transpose(1, 2).flatten(3)  # [T, H, B, G K]
        matrix, inner = wide(self.recurrence).flatten(1, 2).mT.contiguous(), inner.flatten(1).unsqueeze(1)
        start = inputs.new_zeros(*inputs.shape[1:3], self.head_dim)
        # Heads lead inside, as in the products; a state lies batch first, as every layer's does.
        carried = tuple(t.transpose(0, 1) for t in state) if state else (start,) * self.carries
        outputs = []
        chain = self.shards.tokens
        if chain.rank > 0:
            carried = chain.receive(carried, inputs)
        # Where a packed document begins, nothing is remembered.
        kept = None if positions is None else (positions.T != 0).to(start.dtype)[:, None, :, None]
        for t, x in enumerate(inputs.unbind(0)):
            if kept is not None:
                carried = tuple(kept[t] * remembered for remembered in carried)
            carried = self.cell(x, carried, matrix, inner)
            outputs.append(carried[0])
        y = torch.stack(outputs).transpose(1, 2)  # [T, B, H, K]
        y = chain.pass_on(y, carried)
        y = y.to(branch.dtype) * F.silu(branch.squeeze(-2))
        return self.linear_out(y.flatten(2))[0], tuple(t.transpose(0, 1) for t in carried)


class GRU(Recurrent):
    """h_t = z h_{t-1} + (1 - z) n, with the reset gate behind the product, as in torch and cuDNN:

    r, z = sigmoid(x + R h_{t-1});   n = tanh(x_n + r (R_n h_{t-1} + inner))          in the order r, z, n
    """

    gates = 3
    carries = 1

    def cell(self, x: Tensor, carried: Carried, matrix: Tensor, inner: Tensor) -> Carried:
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

    def cell(self, x: Tensor, carried: Carried, matrix: Tensor, inner: Tensor) -> Carried:
        h, c = carried
        i, f, g, o = torch.baddbmm(x, h, matrix).chunk(4, -1)
        c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
        return o.sigmoid() * c.tanh(), c
