"""Newton-Schulz: the orthogonal factor of a matrix by matrix products alone (paper Eq 32, Muon).

X_0 = S / (|S|_F + 1e-7);  k times:  A = X X^T,  X = a X + (b A + c A A) X.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import unrounded, unrounded_backward

EPSILON = 1e-7
# Steps on one Gram matrix. Its rounding is as large as singular values of 2e-4 squared, and the jordan steps blow what
# is small up by 3.4 each: five on one Gram matrix leave 40 times the error of the direct form in float32, two no more.
GRAM_STEPS = 2
HALF = (torch.float16, torch.bfloat16)

# One (a, b, c) a step; the last one repeats.
COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # K. Jordan, "Muon: an optimizer for hidden layers" (2024): fastest growth at zero, does not converge to 1.
    "jordan": ((3.4445, -4.7750, 2.0315),),
    # Amsel, Persson, Musco, Gower, "The Polar Express", arXiv 2505.16932, listing 1, for singular values
    # from 1e-3; divided by 1.01, 1.01^3, 1.01^5 as printed there for stability, all but the last.
    "polar_express": tuple(
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        )
    )
    + ((1.875, -1.25, 0.375),),
}


def schedule(steps: int, coefficients: str) -> list[tuple[float, float, float]]:
    """The (a, b, c) of each of `steps` iterations."""
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"coefficients={coefficients!r} is unknown; choose one of {', '.join(COEFFICIENTS)}")
    if steps < 0:
        raise ValueError(f"steps={steps} must be 0 (identity) or more")
    table = COEFFICIENTS[coefficients]
    return [table[min(i, len(table) - 1)] for i in range(steps)]


def newton_schulz(S: Tensor, steps: int, coefficients: str = "jordan") -> Tensor:
    """NS_k(S), differentiable once; NS_0 is the identity and NS_k(0) = 0.

    S [..., m, n] of any floating dtype; the result has its shape and dtype. Iterates on the side with fewer rows,
    on the Gram matrix alone where the other side is at least 1.5 times longer (same result, fewer FLOPs). Half
    precision is computed in float32 and rounded once, and autocast is left out of it.
    """
    table = schedule(steps, coefficients)
    if not table:
        return S
    if S.dtype in HALF:
        # Squares of float16 overflow from 256 on, and a Gram matrix of half precision rounds away what the steps of
        # the schedule are to lift.
        return newton_schulz(S.float(), steps, coefficients).to(S.dtype)
    if S.shape[-2] > S.shape[-1]:
        return newton_schulz(S.mT, steps, coefficients).mT
    with unrounded(S):
        X = _Normalised.apply(S)
        return gram_form(X, table) if takes_gram_form(*S.shape[-2:]) else direct_form(X, table)


def takes_gram_form(rows: int, cols: int) -> bool:
    """Whether matrices of this shape are iterated on their Gram matrix."""
    return 2 * max(rows, cols) >= 3 * min(rows, cols)


class _Normalised(torch.autograd.Function):
    """S / (|S|_F + EPSILON); by hand, because the gradient of torch's norm at S = 0 is NaN."""

    @staticmethod
    def forward(ctx, S: Tensor) -> Tensor:
        norm = frobenius(S)
        X = S / (norm + EPSILON)
        ctx.save_for_backward(X, norm)
        return X

    @staticmethod
    @torch.autograd.function.once_differentiable
    @unrounded_backward
    def backward(ctx, grad: Tensor) -> Tensor:
        X, norm = ctx.saved_tensors
        return normalised_backward(X, norm, grad)


def frobenius(S: Tensor) -> Tensor:
    """|S|_F of [..., m, n]: [..., 1, 1]."""
    return S.square().sum((-2, -1), keepdim=True).sqrt_()


def normalised_backward(X: Tensor, norm: Tensor, grad: Tensor) -> Tensor:
    """The gradient of S, of X = S / (norm + EPSILON)."""
    along = (grad * X).sum((-2, -1), keepdim=True).div_(norm.masked_fill(norm == 0, 1.0))
    return (grad / (norm + EPSILON)).addcmul_(along, X, value=-1)


def direct_form(X: Tensor, table: list[tuple[float, float, float]]) -> Tensor:
    """The iteration as written: 4 m^2 n + 2 m^3 FLOPs a step for X [..., m, n]."""
    for a, b, c in table:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X


def gram_form(X: Tensor, table: list[tuple[float, float, float]]) -> Tensor:
    """The same map as Q(X X^T) X, twice (GRAM_STEPS, the rest): 8 m^2 n FLOPs, and 8 m^3 a step, for X [..., m, n].

    Every factor is a polynomial of one symmetric matrix, so they commute: with P = a I + b A + c A A,
    Q <- P Q and A <- P A P follow the direct iteration without touching a wide matrix.
    """
    flat = X.reshape(-1, *X.shape[-2:])
    for part in parts_of(table):
        flat = _OnOneGramMatrix.apply(flat, part)
    return flat.view(X.shape)


def parts_of(table: list[tuple[float, float, float]]) -> list[list[tuple[float, float, float]]]:
    """The steps on each Gram matrix."""
    return [part for part in (table[:GRAM_STEPS], table[GRAM_STEPS:]) if part]


def _polynomial(A: Tensor, step: tuple[float, float, float]) -> Tensor:
    """P = a I + b A + c A A."""
    a, b, c = step
    P = torch.baddbmm(A, A, A, beta=b, alpha=c)
    P.diagonal(dim1=-2, dim2=-1).add_(a)
    return P


def on_gram(X: Tensor, table: list[tuple[float, float, float]]) -> tuple[list[Tensor], list[Tensor]]:
    """Of X [N, m, n]: the Gram matrix A_i before each step, and Q_i = P_i ... P_0; the last Q times X is the result."""
    grams = [torch.bmm(X, X.mT)]
    products = [_polynomial(grams[0], table[0])]
    P = products[0]
    for step in table[1:]:
        grams.append(torch.bmm(torch.bmm(P, grams[-1]), P))
        P = _polynomial(grams[-1], step)
        products.append(torch.bmm(P, products[-1]))
    return grams, products


def on_gram_backward(
    X: Tensor, grams: list[Tensor], products: list[Tensor], table: list[tuple[float, float, float]], grad: Tensor
) -> tuple[Tensor, Tensor]:
    """From the gradient of Q X [N, m, n] that of X, and their inner product [N, 1, 1].

    The gradient of a symmetric matrix may be made symmetric: of the product from the left and the one from the right,
    which autograd both takes, the first and its transpose are enough.
    """
    of_product = torch.bmm(grad, X.mT)
    met = (of_product * products[-1]).sum((-2, -1), keepdim=True)
    twice: Tensor | None = None  # the gradient of A_i+1, its transpose added; the last step makes none
    for i in range(len(table) - 1, -1, -1):
        (_, b, c), A = table[i], grams[i]
        of_polynomial = torch.bmm(of_product, products[i - 1]) if i else of_product
        P = _polynomial(A, table[i]) if i else products[0]
        through = None if twice is None else torch.bmm(twice, P)
        if through is not None:
            of_polynomial = torch.baddbmm(of_polynomial, through, A)
        of_polynomial = of_polynomial + of_polynomial.mT
        of_gram = torch.baddbmm(of_polynomial, of_polynomial, A, beta=b, alpha=2 * c)
        if through is not None:
            of_gram.baddbmm_(P, through)
        twice = torch.add(of_gram, of_gram.mT).mul_(0.5)
        if i:
            of_product = torch.bmm(P, of_product)
    assert twice is not None  # there is a step
    if X.stride(-1) == 1:
        return torch.bmm(products[-1], grad).baddbmm_(twice, X), met
    return torch.bmm(grad.mT, products[-1].mT).baddbmm_(X.mT, twice.mT).mT, met


def applied(Q: Tensor, X: Tensor) -> Tensor:
    """Q X [N, m, n] in the layout of X: passes over what lies column by column would stride through memory."""
    return torch.bmm(Q, X) if X.stride(-1) == 1 else torch.bmm(X.mT, Q.mT).mT


class _OnOneGramMatrix(torch.autograd.Function):
    """Q X for X [N, m, n]."""

    @staticmethod
    def forward(ctx, X: Tensor, table: list[tuple[float, float, float]]) -> Tensor:
        grams, products = on_gram(X, table)
        ctx.table = table
        ctx.save_for_backward(X, *grams, *products)
        return applied(products[-1], X)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @unrounded_backward
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        X, *rest = ctx.saved_tensors
        steps = len(ctx.table)
        return on_gram_backward(X, rest[:steps], rest[steps:], ctx.table, grad)[0], None
