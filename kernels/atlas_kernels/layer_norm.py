"""The memory's output norm (no gain, no bias) and the gradient that passes back through it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import unrounded_backward
from .reference import LAYER_NORM_EPSILON


def layer_norm(o: Tensor) -> Tensor:
    """n = (o - mean) / sd over the last dimension."""
    return F.layer_norm(o, o.shape[-1:], eps=LAYER_NORM_EPSILON)


def pull_through_layer_norm(o: Tensor, e: Tensor, plus_output: bool = False) -> Tensor:
    """J e, J the (symmetric) Jacobian of the layer norm at o: (e - mean(e) - n mean(e n)) / sd; differentiable once.

    o, e [..., V]. plus_output: J (e + n) instead. A function of its own: its backward takes about half the time of
    torch's second derivative.
    """
    return _PullThroughLayerNorm.apply(o, e, plus_output)


class _PullThroughLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o: Tensor, e: Tensor, plus_output: bool) -> Tensor:
        n, mean, inverse_sd = torch.native_layer_norm(o, o.shape[-1:], None, None, LAYER_NORM_EPSILON)
        if plus_output:
            e = e + n
        ctx.save_for_backward(o, n, mean, inverse_sd, e)
        ctx.plus_output = plus_output
        return _jacobian_times(o, mean, inverse_sd, e)

    @staticmethod
    @unrounded_backward
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        o, n, mean, inverse_sd, e = ctx.saved_tensors
        grad_e = _jacobian_times(o, mean, inverse_sd, grad)
        # Through n, then through sd: d sd / d o = n / V.
        through_n = torch.addcmul(grad * (e * n).sum(-1, keepdim=True), e, (grad * n).sum(-1, keepdim=True))
        through_n.mul_(inverse_sd / -o.shape[-1])
        if ctx.plus_output:
            through_n.add_(grad_e)
        along_sd = (e * grad_e).sum(-1, keepdim=True).mul_(inverse_sd)
        grad_o = _jacobian_times(o, mean, inverse_sd, through_n)
        return grad_o.addcmul_(n, along_sd, value=-1 / o.shape[-1]), grad_e, None


def _jacobian_times(o: Tensor, mean: Tensor, inverse_sd: Tensor, e: Tensor) -> Tensor:
    """J e, which is torch's own backward of the layer norm at o."""
    wanted = [True, False, False]
    return torch.ops.aten.native_layer_norm_backward(e, o, o.shape[-1:], mean, inverse_sd, None, None, wanted)[0]
