"""Random memories, inputs and gates, and how two implementations of the memory are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atlas_kernels import Gates, MemoryRule, MemoryState, omega_memory
from atlas_kernels.rule import Inputs

# Relative RMS allowed between neighbours of the chain autograd -> reference -> chunked, by dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}


@dataclass
class Problem:
    """Arguments of `omega_memory`, every tensor a leaf that requires gradients."""

    rule: MemoryRule
    q: Tensor
    k: Tensor
    v: Tensor
    gates: Gates
    weights: tuple[Tensor, ...]
    residual: tuple[Tensor, Tensor] | None

    def leaves(self) -> dict[str, Tensor]:
        named = {"q": self.q, "k": self.k, "v": self.v, **vars(self.gates)}
        named |= {f"weights[{i}]": w for i, w in enumerate(self.weights)}
        if self.residual is not None:
            named |= {"residual_q": self.residual[0], "residual_k": self.residual[1]}
        return named

    def inputs(self) -> Inputs:
        """What an implementation takes beside a rule and a state."""
        return Inputs(self.q, self.k, self.v, self.gates, self.residual)

    def run(self, impl: str, start: int = 0, stop: int | None = None, state: MemoryState | None = None):
        """`omega_memory` over the tokens [start, stop)."""
        s = slice(start, stop)
        gates = Gates(*(g[:, s] for g in vars(self.gates).values()))
        residual = None if self.residual is None else (self.residual[0][:, s], self.residual[1][:, s])
        q, k, v = self.q[:, s], self.k[:, s], self.v[:, s]
        return omega_memory(q, k, v, gates, self.weights, self.rule, state=state, residual=residual, impl=impl)


def problem(
    rule: MemoryRule,
    tokens: int,
    *,
    pair: bool = True,
    residual: bool = False,
    batch: int = 2,
    heads: int = 3,
    key: int = 4,
    value: int = 4,
    hidden: int = 6,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """A problem with gates away from their ends, so that every path carries a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        u = torch.rand(shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * u).to(dtype).requires_grad_()

    per_token = (batch, tokens, heads)
    gates = Gates(
        alpha=uniform(0.8, 1.0, *per_token),
        eta=uniform(0.0, 0.05, *per_token),
        theta=uniform(0.5, 1.0, *per_token),
        gamma=uniform(0.0, 1.0, *per_token, *([rule.window] if pair else [])),
    )
    if rule.memory == "linear":
        weights: tuple[Tensor, ...] = (normal(heads, value, key, scale=0.3),)
    else:
        inner = 2 if rule.memory == "gated_mlp" else 1
        weights = (
            normal(heads, value, hidden, scale=0.3),
            *(normal(heads, hidden, key, scale=0.3) for _ in range(inner)),
        )
    return Problem(
        rule=rule,
        q=normal(*per_token, key, scale=0.5),
        k=normal(*per_token, key, scale=0.5),
        v=normal(*per_token, value),
        gates=gates,
        weights=weights,
        residual=(normal(*per_token, value), normal(*per_token, value)) if residual else None,
    )


def gradients(outputs: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a fixed random combination of `outputs`; zeros where a leaf has none."""
    generator = torch.Generator().manual_seed(99)
    loss = outputs[0].new_zeros(())
    for t in outputs:
        loss = loss + (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g
        for (name, leaf), g in zip(leaves.items(), grads, strict=True)
    }


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected; 0 for two empty or two zero tensors."""
    difference = (actual - expected).double().norm().item()
    return difference / max(expected.double().norm().item(), 1e-12) if difference else 0.0


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].shape == expected[name].shape, name
        error = relative_rms(actual[name], expected[name])
        assert error <= TOLERANCE[expected[name].dtype], f"{name}: relative RMS {error:.2e}"


def state_tensors(state: MemoryState) -> dict[str, Tensor]:
    return {f"state[{i}]": t for i, t in enumerate(state.tensors())}


def compare(p: Problem) -> None:
    """Forward, final state and all gradients of chunked against reference."""
    results = {}
    for impl in ("reference", "chunked"):
        y, state = p.run(impl)
        outputs = {"y": y, **state_tensors(state)}
        results[impl] = outputs | gradients(list(outputs.values()), p.leaves())
    assert_close(results["chunked"], results["reference"])
