"""How tokens of a chunk meet a matrix as it stands after their own write, each as one function with its gradients.

The matrix of token t is sum_k c_k[t] M_k + sum_i C[t,i] u_i x_i^T, never formed: M_k are the weights (and the momentum)
at the chunk's start, u_i x_i^T the gradients of its sources. On the narrow and on the wide side:

    widen:   x_t -> sum_k c_k[t] M_k x_t + sum_i C[t,i] (x_i . x_t) u_i
    narrow:  h_t -> sum_k c_k[t] M_k^T h_t + sum_i C[t,i] (u_i . h_t) x_i

By hand, because the gradients that meet at one tensor are summed inside the products, and few passes are left.

Dims: G = B x H memories side by side, C tokens of a chunk, I sources.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import unrounded_backward


def widen(x: Tensor, sources: Tensor, wide: Tensor, narrow: Tensor, *terms: Tensor) -> Tensor:
    """[G, C, n] -> [G, C, w]. sources [G, C, I] is the C above; wide [G, I, w] and narrow [G, I, n] the u and x.

    terms: c_1, M_1, c_2, M_2 ...; [G, C, 1] and [G, w, n] each. Differentiable once.
    """
    return _Widen.apply(x, sources, wide, narrow, *terms)


def narrow(h: Tensor, sources: Tensor, wide: Tensor, narrow: Tensor, *terms: Tensor) -> Tensor:
    """[G, C, w] -> [G, C, n]. Arguments as in `widen`."""
    return _Narrow.apply(h, sources, wide, narrow, *terms)


class _Widen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sources, wide, narrow, *terms):
        scores = torch.bmm(x, narrow.mT)
        out = torch.bmm(sources * scores, wide)
        for c, M in zip(terms[::2], terms[1::2], strict=True):
            out.baddbmm_(c * x, M.mT)
        ctx.save_for_backward(x, sources, wide, narrow, scores, *terms)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @unrounded_backward
    def backward(ctx, grad):
        x, sources, wide, narrow, scores, *terms = ctx.saved_tensors
        grad_scores = torch.bmm(grad, wide.mT)
        grad_sources = grad_scores * scores
        grad_wide = torch.bmm((sources * scores).mT, grad)
        grad_scores.mul_(sources)
        grad_x, grad_narrow = torch.bmm(grad_scores, narrow), torch.bmm(grad_scores.mT, x)
        of_terms = []
        for c, M in zip(terms[::2], terms[1::2], strict=True):
            back = torch.bmm(grad, M)
            of_terms += [(back * x).sum(-1, keepdim=True), torch.bmm(grad.mT, c * x)]
            grad_x.addcmul_(c, back)
        return grad_x, grad_sources, grad_wide, grad_narrow, *of_terms


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, sources, wide, narrow, *terms):
        scores = torch.bmm(h, wide.mT)
        out = torch.bmm(sources * scores, narrow)
        parts = [torch.bmm(h, M) for M in terms[1::2]]
        for c, part in zip(terms[::2], parts, strict=True):
            out.addcmul_(c, part)
        ctx.save_for_backward(h, sources, wide, narrow, scores, *terms, *parts)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @unrounded_backward
    def backward(ctx, grad):
        h, sources, wide, narrow, scores, *rest = ctx.saved_tensors
        count = len(rest) // 3
        terms, parts = rest[: 2 * count], rest[2 * count :]
        grad_scores = torch.bmm(grad, narrow.mT)
        grad_sources = grad_scores * scores
        grad_narrow = torch.bmm((sources * scores).mT, grad)
        grad_scores.mul_(sources)
        grad_h, grad_wide = torch.bmm(grad_scores, wide), torch.bmm(grad_scores.mT, h)
        of_terms = []
        for c, M, part in zip(terms[::2], terms[1::2], parts, strict=True):
            scaled = c * grad
            of_terms += [(grad * part).sum(-1, keepdim=True), torch.bmm(h.mT, scaled)]
            grad_h.baddbmm_(scaled, M.mT)
        return grad_h, grad_sources, grad_wide, grad_narrow, *of_terms
