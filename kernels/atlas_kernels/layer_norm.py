"""The memory's output norm (no gain, no bias) and the gradient that passes back through it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import unrounded_backward
from .reference import LAYER_NORM_EPSILON


class Normalised(NamedTuple):
    """o [..., V], n = (o - mean) / sd, and mean and 1 / sd [..., 1]."""

    o: Tensor
    n: Tensor
    mean: Tensor
    inverse_sd: Tensor


def normalised(o: Tensor) -> Normalised:
    """The layer norm of o [..., V] with what its Jacobian is made of."""
    return Normalised(o, *torch.native_layer_norm(o, o.shape[-1:], None, None, LAYER_NORM_EPSILON))


def layer_norm(o: Tensor) -> Tensor:
    """n = (o - mean) / sd over the last dimension."""
    return F.layer_norm(o, o.shape[-1:], eps=LAYER_NORM_EPSILON)


def pull_through_layer_norm(o: Tensor, e: Tensor, plus_output: bool = False) -> Tensor:
    """J e, J the (symmetric) Jacobian of the layer norm at o: (e - mean(e) - n mean(e n)) / sd; differentiable once.

    o, e [..., V]. plus_output: J (e + n) instead. A function of its own: its backward takes about half the time of
    torch's second derivative.
    """
    return _PullThroughLayerNorm.apply(o, e, plus_output)


def jacobian_times(of: Normalised, e: Tensor) -> Tensor:
    """J e, which is torch's own backward of the layer norm at o."""
    wanted = [True, False, False]
    shape = of.o.shape[-1:]
    return torch.ops.aten.native_layer_norm_backward(e, of.o, shape, of.mean, of.inverse_sd, None, None, wanted)[0]


def pull_backward(of: Normalised, e: Tensor, grad: Tensor, plus_output: bool) -> tuple[Tensor, Tensor]:
    """From the gradient of J e those of o and of e; with plus_output e holds the n, and its share reaches o too."""
    _, n, _, inverse_sd = of
    grad_e = jacobian_times(of, grad)
    # Through n, then through sd: d sd / d o = n / V.
    through_n = torch.addcmul(grad * (e * n).sum(-1, keepdim=True), e, (grad * n).sum(-1, keepdim=True))
    through_n.mul_(inverse_sd / -n.shape[-1])
    if plus_output:
        through_n.add_(grad_e)
    along_sd = (e * grad_e).sum(-1, keepdim=True).mul_(inverse_sd)
    grad_o = jacobian_times(of, through_n)
    return grad_o.addcmul_(n, along_sd, value=-1 / n.shape[-1]), grad_e


class _PullThroughLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o: Tensor, e: Tensor, plus_output: bool) -> Tensor:
        of = normalised(o)
        if plus_output:
            e = e + of.n
        ctx.save_for_backward(*of, e)
        ctx.plus_output = plus_output
        return jacobian_times(of, e)

    @staticmethod
    @unrounded_backward
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        *of, e = ctx.saved_tensors
        return *pull_backward(Normalised(*of), e, grad, ctx.plus_output), None
