"""Feature maps phi: lift queries and keys before the memory reads them (MATH: paper Eq 5, section 3.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FEATURE_MAPS = ("identity", "hadamard")


def lift(x: Tensor, feature_map: str, coefficients: Tensor | None = None) -> Tensor:
    """phi(x), in the dtype of x.

    identity: x itself. hadamard: sum_i a_i x^i, elementwise, i = 0..p; keeps the dimension.
    x [..., H, K]; coefficients a_0..a_p: [p+1], or [H, p+1] for one polynomial a head.
    Raises ValueError for an unknown map, or missing or misshapen coefficients.
    """
    if feature_map == "identity":
        return x
    if feature_map != "hadamard":
        raise ValueError(f"feature_map={feature_map!r} is unknown; choose one of {', '.join(FEATURE_MAPS)}")
    if coefficients is None:
        raise ValueError("feature_map='hadamard' needs its coefficients a_0..a_p; see initial_coefficients()")
    if coefficients.dim() not in (1, 2) or (coefficients.dim() == 2 and coefficients.shape[0] != x.shape[-2]):
        raise ValueError(
            f"coefficients have shape {tuple(coefficients.shape)}; expected [p+1] or [H, p+1] with H={x.shape[-2]}"
        )
    *lower, highest = coefficients.to(x.dtype).unsqueeze(-1).unbind(-2)
    out = highest.expand_as(x)
    for a in reversed(lower):
        out = out * x + a
    return out


def initial_coefficients(feature_map: str, degree: int) -> Tensor | None:
    """Where the learnable a_0..a_p start: a_0 = 0, a_i = 1/i!, float32 [p+1]; None where the map has none."""
    if feature_map == "identity":
        return None
    if degree < 1:
        raise ValueError(f"degree={degree} leaves feature_map={feature_map!r} constant; it must be at least 1")
    return torch.tensor([0.0] + [1.0 / math.factorial(i) for i in range(1, degree + 1)])
