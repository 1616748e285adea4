"""Batched products whose gradients keep the layout of their arguments.

autograd differentiates `a @ b.mT` with respect to `b.mT`, so the gradient of b arrives transposed, and every
element-wise pass that meets it afterwards strides through memory. These two give it row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import unrounded_backward


def times_transpose(a: Tensor, b: Tensor) -> Tensor:
    """a b^T: a [G, m, k], b [G, n, k] -> [G, m, n]."""
    return _TimesTranspose.apply(a, b)


def step_pair(
    W: Tensor, S: Tensor, last: Tensor, to_w: Tensor, to_s: Tensor, wide: Tensor, narrow: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights and the momentum that leave a chunk: (a W + k S + wide^T to_w narrow, t S + wide^T to_s narrow).

    W, S [G, m, n]; last [G, 3, 1] = (a, k, t); to_w, to_s [G, I, 1]; wide [G, I, m]; narrow [G, I, n]. One function,
    so that the gradients that meet here are summed inside the products.
    """
    return _StepPair.apply(W, S, last, to_w, to_s, wide, narrow)


class _TimesTranspose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a, b.mT)

    @staticmethod
    @unrounded_backward
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return torch.bmm(grad, b) if need_a else None, torch.bmm(grad.mT, a) if need_b else None


class _StepPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W, S, last, to_w, to_s, wide, narrow):
        ctx.save_for_backward(W, S, last, to_w, to_s, wide, narrow)
        a, k, t = last.unsqueeze(-1).unbind(1)
        written = torch.addcmul(a * W, k, S).baddbmm_(wide.mT, to_w * narrow)
        return written, (t * S).baddbmm_(wide.mT, to_s * narrow)

    @staticmethod
    @unrounded_backward
    def backward(ctx, grad_w: Tensor, grad_s: Tensor):
        W, S, last, to_w, to_s, wide, narrow = ctx.saved_tensors
        a, k, t = last.unsqueeze(-1).unbind(1)
        grad_last = torch.stack([(g * m).sum((1, 2)) for g, m in ((grad_w, W), (grad_w, S), (grad_s, S))], 1)
        of_w, of_s = torch.bmm(wide, grad_w), torch.bmm(wide, grad_s)
        return (
            a * grad_w,
            torch.addcmul(t * grad_s, k, grad_w),
            grad_last.unsqueeze(-1),
            (of_w * narrow).sum(-1, keepdim=True),
            (of_s * narrow).sum(-1, keepdim=True),
            torch.bmm(to_w * narrow, grad_w.mT).baddbmm_(to_s * narrow, grad_s.mT),
            of_w.mul_(to_w).addcmul_(to_s, of_s),
        )
