"""Newton-Schulz: the orthogonal factor of a matrix by matrix products alone (paper Eq 32, Muon).

X_0 = S / (|S|_F + 1e-7);  k times:  A = X X^T,  X = a X + (b A + c A A) X.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-7
# Steps on one Gram matrix. Its rounding is as large as singular values of 2e-4 squared, and the jordan steps blow what
# is small up by 3.4 each: five on one Gram matrix leave 40 times the error of the direct form in float32, two no more.
GRAM_STEPS = 2

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
    """NS_k(S), differentiable; NS_0 is the identity and NS_k(0) = 0.

    S [..., m, n] of any floating dtype; the result has its shape and dtype. Iterates on the side with fewer rows,
    on the Gram matrix alone where the other side is at least 1.5 times longer (same result, fewer FLOPs).
    """
    table = schedule(steps, coefficients)
    if not table:
        return S
    if S.shape[-2] > S.shape[-1]:
        return newton_schulz(S.mT, steps, coefficients).mT
    # Frobenius norm by hand: torch's has a NaN gradient at S = 0.
    X = S / (_frobenius(S) + EPSILON)
    return gram_form(X, table) if 2 * S.shape[-1] >= 3 * S.shape[-2] else direct_form(X, table)


def _frobenius(S: Tensor) -> Tensor:
    square = S.square().sum((-2, -1), keepdim=True)
    empty = square == 0
    return torch.where(empty, 0.0, torch.where(empty, 1.0, square).sqrt())


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
    for part in (table[:GRAM_STEPS], table[GRAM_STEPS:]):
        X = _on_one_gram_matrix(X, part) if part else X
    return X


def _on_one_gram_matrix(X: Tensor, table: list[tuple[float, float, float]]) -> Tensor:
    A = X @ X.mT
    Q: Tensor | None = None
    for step, (a, b, c) in enumerate(table):
        P = b * A + c * (A @ A)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        Q = P if Q is None else P @ Q
        if step + 1 < len(table):
            A = P @ A @ P
    return X if Q is None else Q @ X
