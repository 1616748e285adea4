"""Small problems on the device that the kernels run on, and how these are compared with the chunk form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atlas_kernels import Gates, MemoryRule
from tests.support.problems import Problem, assert_close, gradients, problem, relative_rms, state_tensors

CHUNK, WIDTH, HIDDEN = 16, 16, 32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative RMS allowed to products with rounded operands, beside float64 from the same rounded inputs, by their dtype.
# float16, 11 bits: what float64 itself moves by where keys and start weights move by 2^-12 of their size is at most
# 6e-3 for these small problems with a plain memory, 2.5e-2 with a gated one. bfloat16, 8 bits, at the presets' shape:
# moved by 2^-8 of their size, 3.8e-2 and 5.1e-2 without Newton-Schulz, 1.3e-2 and 2.5e-2 with it.
ROUNDED_TOLERANCE = {
    (torch.float16, "mlp"): 1e-2,
    (torch.float16, "gated_mlp"): 5e-2,
    (torch.bfloat16, "mlp"): 8e-2,
    (torch.bfloat16, "gated_mlp"): 1.5e-1,
}
# Of Newton-Schulz with five steps, |ours - float64| / |float64|, (forward, gradient). The torch form itself is at 2e-6
# in float32; a rounded factor's error, 5e-4 in float16, grows with the steps; in bfloat16, rounded in torch as the
# kernels round, it comes to 2.8e-2 and 4.9e-2 at most (random matrices; a fifth of it where singular values fall off).
# A GPU makes a float32 product of three tf32 products, whose factors keep 21 or 22 of 24 bits; five steps amplify that.
NEWTON_SCHULZ_TOLERANCE = {
    torch.float32: (5e-5, 1e-4) if DEVICE == "cuda" else (1e-5, 3e-5),
    torch.float16: (1e-2, 2e-2),
    torch.bfloat16: (6e-2, 1e-1),
}
BFLOAT16_ON_A_GPU = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="bfloat16 products need a GPU: Triton's interpreter computes them wrongly"
)


def small(rule: MemoryRule, tokens: int, **changes) -> Problem:
    sizes = {"batch": 1, "heads": 1, "key": WIDTH, "value": WIDTH, "hidden": HIDDEN, "dtype": torch.float32} | changes
    p = problem(rule, tokens, **sizes)
    move = lambda t: t.detach().to(DEVICE).requires_grad_()  # noqa: E731
    residual = None if p.residual is None else (move(p.residual[0]), move(p.residual[1]))
    gates = Gates(*(move(g) for g in vars(p.gates).values()))
    return replace(
        p, q=move(p.q), k=move(p.k), v=move(p.v), gates=gates, weights=tuple(map(move, p.weights)), residual=residual
    )


def outputs_and_gradients(p: Problem, impl: str) -> dict[str, torch.Tensor]:
    y, state = p.run(impl)
    outputs = {"y": y, **state_tensors(state)}
    return outputs | gradients([t.float() if t.dtype != torch.float64 else t for t in outputs.values()], p.leaves())


def compare(p: Problem) -> None:
    assert_close(outputs_and_gradients(p, "triton"), outputs_and_gradients(p, "chunked"))


def rounded(p: Problem, products: torch.dtype) -> tuple[Problem, Problem]:
    """`p` with inputs in `products`, which makes products of them, and the same in float64."""
    q, k, v = (t.detach().to(products).requires_grad_() for t in (p.q, p.k, p.v))
    low = replace(p, q=q, k=k, v=v)
    exact = lambda t: t.detach().double().requires_grad_()  # noqa: E731
    gates = Gates(*map(exact, vars(low.gates).values()))
    high = replace(low, q=exact(q), k=exact(k), v=exact(v), gates=gates, weights=tuple(map(exact, low.weights)))
    return low, high


def compare_rounded(p: Problem, products: torch.dtype) -> None:
    low, high = rounded(p, products)
    found, expected = outputs_and_gradients(low, "triton"), outputs_and_gradients(high, "chunked")
    assert found["y"].dtype == products and found["state[0]"].dtype == torch.float32
    for name, true in expected.items():
        error = relative_rms(found[name].double(), true)
        assert error <= ROUNDED_TOLERANCE[products, p.rule.memory], f"{name}: relative RMS {error:.2e}"
