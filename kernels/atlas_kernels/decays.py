"""Products of decays and windows of gates as matrices over a chunk: the scalar side of the chunk form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import unrounded_backward


def decay_matrix(gate: Tensor) -> Tensor:
    """T[t, s] = prod_{r=s+1..t} gate_r for s <= t, else 0. gate [..., C] in [0, 1] -> [..., C, C].

    Through cumulative sums of logs; a gate of exactly 0 gives 0, and the gradient is exact there too.
    """
    return _DecayMatrix.apply(gate)


class _DecayMatrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor) -> Tensor:
        zero = gate == 0
        # Base 2: on a CPU its exponential is the fast one.
        logs = running_sum(gate.masked_fill(zero, 1.0).log2())
        products = (logs.unsqueeze(-1) - logs.unsqueeze(-2)).exp2_()
        # A product over a zero is zero: the counts of zeros up to t and up to s differ.
        zeros = running_sum(zero.to(gate.dtype))
        products.mul_(torch.eq(zeros.unsqueeze(-1), zeros.unsqueeze(-2), out=torch.empty_like(products)))
        products = products.tril_()
        ctx.save_for_backward(products)
        return products

    @staticmethod
    @unrounded_backward
    def backward(ctx, grad: Tensor) -> Tensor:
        # d T[t,s] / d gate_r = T[t,r] T[r-1,s] for s < r <= t.
        (products,) = ctx.saved_tensors
        through = (products.mT @ grad)[..., 1:, :] * products[..., :-1, :]
        return F.pad(through.sum(-1), (1, 0))


def running_sum(x: Tensor) -> Tensor:
    """x.cumsum(-1); on a GPU under `torch.use_deterministic_algorithms`, where torch's own is refused, by doubling.

    x [..., C] floating point. Doubling takes log2(C) additions of the whole tensor.
    """
    if x.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(-1)
    return sum_by_doubling(x)


def sum_by_doubling(x: Tensor) -> Tensor:
    """x.cumsum(-1) of additions alone: each entry takes in what stands 1, 2, 4, ... before it."""
    reach = 1
    while reach < x.shape[-1]:
        x = x + F.pad(x[..., :-reach], (reach, 0))
        reach *= 2
    return x


def pair_band(gamma: Tensor) -> Tensor:
    """Gm[t, i] = gamma of reader t and source i, 0 outside the window. gamma [..., C, W] -> [..., C, C+W-1].

    Entry j of gamma belongs to source t-j; source i of the result stands i-(W-1) tokens after the chunk's first.
    """
    tokens, window = gamma.shape[-2:]
    sources = tokens + window - 1
    # Rows of length `sources + 1` read back at length `sources` shift by one more place each.
    rows = F.pad(gamma.flip(-1), (0, tokens)).flatten(-2)
    return rows[..., : tokens * sources].unflatten(-1, (tokens, sources))


def source_band(gamma: Tensor, tokens: int) -> Tensor:
    """Gm[t, i] = gamma_i inside the window of reader t, else 0. gamma [..., C+W-1] -> [..., C, C+W-1]."""
    window = gamma.shape[-1] - tokens + 1
    inside = gamma.new_ones(tokens, gamma.shape[-1]).triu().tril(window - 1)
    return gamma.unsqueeze(-2) * inside
