"""Feature maps phi: lift queries and keys before the memory reads them (paper Eq 5, section 3.1).

Dims: H heads, K key, D lifted key, p degree.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations_with_replacement

import torch
from torch import Tensor

FEATURE_MAPS = ("identity", "hadamard", "taylor", "sketch")


def lift(x: Tensor, feature_map: str, coefficients: Tensor | None = None, sketch_width: int = 0) -> Tensor:
    """phi(x) [..., H, D], in the dtype of x [..., H, K].

    identity: x itself. hadamard: sum_i a_i x^i, elementwise, i = 0..p; D = K. taylor: all monomials of degree <= p, so
    weighted that phi(q) . phi(k) = sum_i a_i (q . k)^i exactly (Eq 5); D = C(K+p, p). sketch: the same kernel in the
    mean over random signs and buckets, degrees 0 and 1 exact, each other one in `sketch_width` features (TensorSketch,
    Pham and Pagh 2013); D = 1 + K + (p-1) sketch_width.
    coefficients [p+1], or [H, p+1] for one polynomial a head: hadamard's a_i; for taylor and sketch their square roots,
    so that a_i >= 0 whatever is learned.
    Raises ValueError for an unknown map, or missing or misshapen coefficients.
    """
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map={feature_map!r} is unknown; choose one of {', '.join(FEATURE_MAPS)}")
    if feature_map == "identity":
        return x
    if coefficients is None:
        raise ValueError(f"feature_map={feature_map!r} needs its coefficients a_0..a_p; see initial_coefficients()")
    if coefficients.dim() not in (1, 2) or (coefficients.dim() == 2 and coefficients.shape[0] != x.shape[-2]):
        raise ValueError(
            f"coefficients have shape {tuple(coefficients.shape)}; expected [p+1] or [H, p+1] with H={x.shape[-2]}"
        )
    by_degree = coefficients.to(x.dtype).unsqueeze(-1).unbind(-2)  # [1] or [H, 1] each
    if feature_map == "hadamard":
        return _hadamard(x, by_degree)
    if feature_map == "taylor":
        return torch.cat([a * part for a, part in zip(by_degree, _monomials(x, len(by_degree) - 1), strict=True)], -1)
    if sketch_width < 1:
        raise ValueError(f"sketch_width={sketch_width} leaves feature_map='sketch' no features; give at least 1")
    return torch.cat(
        [a * _tensor_sketch(x, i, sketch_width) for i, a in enumerate(by_degree)],
        -1,
    )


def lifted_width(feature_map: str, width: int, degree: int, sketch_width: int = 0) -> int:
    """D of the lifted keys for keys of `width`."""
    if feature_map == "taylor":
        return math.comb(width + degree, degree)
    if feature_map == "sketch":
        return 1 + width + (degree - 1) * sketch_width
    return width


def initial_coefficients(feature_map: str, degree: int) -> Tensor | None:
    """Where the learnable coefficients of `lift` start, float32 [p+1]; None where the map has none.

    a_i = 1/i!, but a_0 = 0 for hadamard; taylor and sketch take the square roots.
    """
    if feature_map == "identity":
        return None
    if degree < 1:
        raise ValueError(f"degree={degree} leaves feature_map={feature_map!r} constant; it must be at least 1")
    a = torch.tensor([1.0 / math.factorial(i) for i in range(degree + 1)])
    if feature_map == "hadamard":
        a[0] = 0.0
        return a
    return a.sqrt()


def _hadamard(x: Tensor, by_degree: tuple[Tensor, ...]) -> Tensor:
    *lower, highest = by_degree
    out = highest.expand_as(x)
    for a in reversed(lower):
        out = out * x + a
    return out


def _monomials(x: Tensor, degree: int) -> list[Tensor]:
    """For i = 0..degree all x_j1 ... x_ji with j1 <= ... <= ji, times sqrt(i! / prod of multiplicities!)."""
    parts = [torch.ones_like(x[..., :1])]
    for i in range(1, degree + 1):
        parents, factors, ratio = _table(x.shape[-1], i)
        parents, factors, ratio = (t.to(x.device) for t in (parents, factors, ratio))
        parts.append(parts[-1].index_select(-1, parents) * x.index_select(-1, factors) * ratio.to(x.dtype))
    return parts


@lru_cache(maxsize=32)
def _table(width: int, degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each monomial of `degree` as one of the degree before times one more factor: (which, factor, ratio of roots)."""
    below = {m: place for place, m in enumerate(combinations_with_replacement(range(width), degree - 1))}
    monomials = list(combinations_with_replacement(range(width), degree))
    ratios = [math.sqrt(degree / m.count(m[-1])) for m in monomials]
    return (
        torch.tensor([below[m[:-1]] for m in monomials]),
        torch.tensor([m[-1] for m in monomials]),
        torch.tensor(ratios, dtype=torch.float64),
    )


def _tensor_sketch(x: Tensor, degree: int, width: int, seed: int = 0) -> Tensor:
    """Features whose inner product is (q . k)^degree: exactly for degree 0 and 1, else in the mean over seeds."""
    if degree == 0:
        return torch.ones_like(x[..., :1])
    if degree == 1:
        return x
    # The convolution of count sketches is a count sketch of the outer product.
    product = torch.fft.rfft(x @ _count_sketch(x.shape[-1], width, degree, 0, seed).to(x))
    for factor in range(1, degree):
        product = product * torch.fft.rfft(x @ _count_sketch(x.shape[-1], width, degree, factor, seed).to(x))
    return torch.fft.irfft(product, n=width)


@lru_cache(maxsize=64)
def _count_sketch(width: int, buckets: int, degree: int, factor: int, seed: int) -> Tensor:
    """[width, buckets], in each row one sign in one bucket."""
    generator = torch.Generator().manual_seed(7919 * seed + 101 * degree + factor)
    matrix = torch.zeros(width, buckets, dtype=torch.float64)
    signs = 2.0 * torch.randint(2, (width,), generator=generator).double() - 1.0
    matrix[torch.arange(width), torch.randint(buckets, (width,), generator=generator)] = signs
    return matrix
