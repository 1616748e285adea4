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


def plus_outer(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """c + a^T b, the sum of the outer products of rows: c [G, m, n], a [G, k, m], b [G, k, n] -> [G, m, n]."""
    return _PlusOuter.apply(c, a, b)


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


class _PlusOuter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, c: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.baddbmm(c, a.mT, b)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return grad, torch.bmm(b, grad.mT), torch.bmm(a, grad)
