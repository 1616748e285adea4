"""What is timed and counted: one forward and backward of a memory's op, or of its edges, at a shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_kernels import Gates, gated_norm, initial_coefficients, lift, omega_memory, short_convolution
from atlas_kernels.layer_start import eta_start, lifted, weight_shapes
from atlas_megatron.config import MemoryConfig


@dataclass(frozen=True)
class OpInputs:
    """What a memory's op is given. leaves: q, k of length 1, not lifted, v [B, T, H, K], the gates alpha, eta, theta,
    gamma, the start weights; coefficients: of the feature map, or None."""

    memory: MemoryConfig
    leaves: tuple[Tensor, ...]
    coefficients: Tensor | None

    @classmethod
    def random(cls, memory: MemoryConfig, batch: int, tokens: int, device: str) -> OpInputs:
        """As the mixer gives them, float32."""
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
        alpha = 0.99 * one if memory.retention else one
        gates = (alpha, one if memory.step_in_momentum else eta, 0.9 * one if memory.momentum else 0 * one, gamma)
        sizes = weight_shapes(memory)
        weights = (torch.randn(memory.heads, rows, cols, device=device) * cols**-0.5 for rows, cols in sizes)
        coefficients = initial_coefficients(memory.feature_map, memory.degree)
        leaves = tuple(t.clone().requires_grad_() for t in (q, k, v, *gates, *weights))
        return cls(memory, leaves, None if coefficients is None else coefficients.to(device))

    def in_float64(self) -> OpInputs:
        """The same numbers."""
        return replace(self, leaves=tuple(t.detach().double().requires_grad_() for t in self.leaves))

    def output(self, impl: str, products: torch.dtype | None = None, positions: Tensor | None = None) -> Tensor:
        """What the op reads [B, T, H, K]; impl, products, positions: see the op."""
        memory, rule = self.memory, self.memory.rule()
        q, k, v, alpha, eta, theta, gamma, *start = self.leaves
        x, y = (lift(t, memory.feature_map, self.coefficients, memory.sketch_width) for t in (k, q))
        own_residual = memory.network != "linear" and (rule.dual or lifted(memory) != memory.head_dim)
        residual = (q, k) if own_residual else None
        given = {"residual": residual, "impl": impl, "positions": positions, "products": products}
        return omega_memory(y, x, v, Gates(alpha, eta, theta, gamma), tuple(start), rule, **given)[0]

    def gradients(self, of: Tensor) -> tuple[Tensor | None, ...]:
        """Of a number, by leaf. Without momentum none comes to theta."""
        return torch.autograd.grad(of, self.leaves, allow_unused=True)


def contender(
    memory: MemoryConfig,
    positions: Tensor | None = None,
    *,
    batch: int,
    tokens: int,
    products: torch.dtype = torch.float32,
    device: str = "cpu",
    impl: str = "auto",
) -> Callable[[], tuple[Tensor | None, ...]]:
    """Forward and backward of the op on random inputs; `products`: see the op.

    What is called gives the gradients, anew each time: a CUDA graph's replays would add up what `.grad` holds.
    """
    given = OpInputs.random(memory, batch, tokens, device)
    return lambda: given.gradients(given.output(impl, products, positions).square().mean())


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
