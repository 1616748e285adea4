"""What is timed and counted: one forward and backward of a memory's op, or of its edges, at a shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_kernels import Gates, gated_norm, initial_coefficients, lift, omega_memory, short_convolution
from atlas_kernels.layer_start import eta_start, lifted, weight_shapes
from atlas_megatron.config import MemoryConfig


def contender(
    memory: MemoryConfig,
    positions: Tensor | None = None,
    *,
    batch: int,
    tokens: int,
    products: torch.dtype = torch.float32,
    device: str = "cpu",
    impl: str = "auto",
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of the op on random inputs as the mixer gives them, float32; `products`: see the op.

    What is called gives the gradients, anew each time: a CUDA graph's replays would add up what `.grad` holds.
    """
    torch.manual_seed(0)
    shape = (batch, tokens, memory.heads, memory.head_dim)
    q, k = (F.normalize(torch.randn(shape, device=device), dim=-1) for _ in range(2))
    v = torch.randn(shape, device=device)
    eta = torch.full(shape[:3], eta_start(memory), device=device)
    one = torch.ones_like(eta)
    gamma = {
        "pair": 0.5 * one.unsqueeze(-1).expand(*one.shape, memory.window).clone(),
        "source": 0.5 * one,
        "none": eta if memory.step_in_momentum else one,
    }[memory.omega_gates]
    gates = Gates(
        alpha=0.99 * one if memory.retention else one,
        eta=one if memory.step_in_momentum else eta,
        theta=0.9 * one if memory.momentum else 0 * one,
        gamma=gamma,
    )
    matrices = weight_shapes(memory)
    weights = [torch.randn(memory.heads, rows, cols, device=device) * cols**-0.5 for rows, cols in matrices]
    coefficients = initial_coefficients(memory.feature_map, memory.degree)
    coefficients = None if coefficients is None else coefficients.to(device)
    leaves = [t.clone().requires_grad_() for t in (q, k, v, *vars(gates).values(), *weights)]
    rule = memory.rule()
    own_residual = memory.network != "linear" and (rule.dual or lifted(memory) != memory.head_dim)

    def run() -> tuple[Tensor, ...]:
        q, k, v, alpha, eta, theta, gamma, *start = leaves
        x, y = (lift(t, memory.feature_map, coefficients, memory.sketch_width) for t in (k, q))
        residual = (q, k) if own_residual else None
        gates = Gates(alpha, eta, theta, gamma)
        given = {"residual": residual, "impl": impl, "positions": positions, "products": products}
        out, _ = omega_memory(y, x, v, gates, tuple(start), rule, **given)
        # Without momentum no gradient comes to theta.
        return torch.autograd.grad(out.square().mean(), leaves, allow_unused=True)

    return run


def edges_of(shape: tuple[int, ...], device: str) -> dict[str, tuple[Callable[[str], tuple[Tensor, ...]], int]]:
    """The memory's edges, forward and backward with an `impl`, and the bytes that each has to move: its inputs, outputs
    and gradients, once."""
    batch, tokens, heads, size = shape
    make = lambda *s: torch.randn(*s, device=device, dtype=torch.bfloat16).requires_grad_()  # noqa: E731
    qkv, taps = make(batch, tokens, heads, 3, size), make(heads, 3 * size, 4)
    y, gate, gain = torch.randn(shape, device=device).requires_grad_(), make(*shape), make(heads, size)
    grad = torch.randn(shape, device=device)

    def convolution(impl: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(short_convolution(qkv, taps, None, None, impl)[:3], (qkv, taps), (grad,) * 3)

    def norm(impl: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(gated_norm(y, gate, gain, 1e-5, impl), (y, gate, gain), gate)

    # Forward: in bfloat16, out float32; and the other way, the gate and the result in bfloat16. Backward: what went in,
    # the result's gradient, the inputs' gradients.
    return {
        "q, k, v": (convolution, 3 * grad.numel() * (2 + 4 + 2 + 4 + 2)),
        "output": (norm, grad.numel() * (4 + 2 + 2 + 4 + 2 + 2 + 4 + 2)),
    }
