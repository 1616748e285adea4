"""Batched products whose gradients keep the layout of their arguments.

autograd differentiates `a @ b.mT` with respect to `b.mT`, so the gradient of b arrives transposed, and every
element-wise pass that meets it afterwards strides through memory. These two give it row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def times_transpose(a: Tensor, b: Tensor) -> Tensor:
    """a b^T: a [G, m, k], b [G, n, k] -> [G, m, n]."""
    return _TimesTranspose.apply(a, b)


def step_pair(
    W: Tensor, S: Tensor, last: Tensor, wide: Tensor, narrow_w: Tensor, narrow_s: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights and the momentum that leave a chunk: (a W + k S + wide^T narrow_w, t S + wide^T narrow_s).

    W, S [G, m, n]; last [G, 3, 1] = (a, k, t); wide [G, I, m]; narrow_w, narrow_s [G, I, n]. One function, so that
    the gradients that meet here are summed inside the products.
    """
    return _StepPair.apply(W, S, last, wide, narrow_w, narrow_s)


class _TimesTranspose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a, b.mT)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return torch.bmm(grad, b) if need_a else None, torch.bmm(grad.mT, a) if need_b else None


class _StepPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W, S, last, wide, narrow_w, narrow_s):
        ctx.save_for_backward(W, S, last, wide, narrow_w, narrow_s)
        a, k, t = last.unsqueeze(-1).unbind(1)
        written = torch.addcmul(a * W, k, S).baddbmm_(wide.mT, narrow_w)
        return written, (t * S).baddbmm_(wide.mT, narrow_s)

    @staticmethod
    def backward(ctx, grad_w: Tensor, grad_s: Tensor):
        W, S, last, wide, narrow_w, narrow_s = ctx.saved_tensors
        a, k, t = last.unsqueeze(-1).unbind(1)
        grad_last = torch.stack([(g * m).sum((1, 2)) for g, m in ((grad_w, W), (grad_w, S), (grad_s, S))], 1)
        grad_wide = torch.bmm(narrow_w, grad_w.mT).baddbmm_(narrow_s, grad_s.mT)
        return (
            a * grad_w,
            torch.addcmul(t * grad_s, k, grad_w),
            grad_last.unsqueeze(-1),
            grad_wide,
            torch.bmm(wide, grad_w),
            torch.bmm(wide, grad_s),
        )
