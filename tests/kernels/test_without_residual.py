"""A deep memory without residual is the one with a residual of zeros, in every form, and carries no halo of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from atlas_kernels import Gates, MemoryRule, omega_memory
from atlas_kernels.gelu import gelu
from atlas_kernels.op import read_memory
from atlas_kernels.reference_dual import omega_memory_dual_reference
from atlas_kernels.rule import Inputs

BATCH, TOKENS, HEADS, WIDTH, HIDDEN = 2, 13, 2, 4, 6
RULES = {
    "atlas": MemoryRule(memory="mlp", window=3, chunk=4, ns_period=2, residual=False),
    "atlas++": MemoryRule(memory="gated_mlp", window=3, chunk=4, ns_period=4, residual=False),
    "titans": MemoryRule(memory="mlp", window=1, chunk=4, ns_steps=0, norm="layer", residual=False),
    "dot": MemoryRule(memory="mlp", loss="dot", window=2, chunk=4, ns_steps=0, norm="layer", residual=False),
    "exponential": MemoryRule(
        memory="mlp", window=3, chunk=4, ns_steps=0, momentum=False, kernel="exponential", residual=False
    ),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def leaves(rule: MemoryRule, lifted: int = WIDTH) -> list[Tensor]:
    """q, k, v, alpha, eta, theta, gamma, then the start weights, float64."""
    generator = torch.Generator().manual_seed(5)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    gate = lambda *more: normal(BATCH, TOKENS, HEADS, *more).sigmoid()  # noqa: E731
    shapes = [(WIDTH, HIDDEN), *[(HIDDEN, lifted)] * (2 if rule.memory == "gated_mlp" else 1)]
    given = [normal(BATCH, TOKENS, HEADS, width) for width in (lifted, lifted, WIDTH)]
    given += [gate(), 0.1 * gate(), gate(), gate(rule.window), *(0.5 * normal(HEADS, *shape) for shape in shapes)]
    return [t.requires_grad_() for t in given]


def run(rule: MemoryRule, given: list[Tensor], impl: str = "chunked", zeros: bool = False) -> Tensor:
    q, k, v, alpha, eta, theta, gamma, *weights = given
    residual = (torch.zeros_like(v), torch.zeros_like(v)) if zeros else None
    gates = Gates(alpha=alpha, eta=eta, theta=theta, gamma=gamma)
    if rule.dual and impl == "reference":
        return omega_memory_dual_reference(rule, tuple(weights), Inputs(q, k, v, gates, residual))
    return omega_memory(q, k, v, gates, tuple(weights), rule, residual=residual, impl=impl)[0]


@every_rule
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_it_is_a_residual_of_zeros(rule: MemoryRule, impl: str) -> None:
    given = leaves(rule)
    y, wanted = run(rule, given, impl), run(replace(rule, residual=True), given, zeros=True)
    torch.testing.assert_close(y, wanted, rtol=1e-9, atol=1e-11)
    weighing = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    used = given if rule.momentum else given[:5] + given[6:]  # theta is not read without momentum
    ours, theirs = (torch.autograd.grad((t * weighing).sum(), used) for t in (y, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@every_rule
def test_it_goes_on_at_any_cut_and_carries_no_residuals(rule: MemoryRule) -> None:
    q, k, v, alpha, eta, theta, gamma, *weights = given = leaves(rule)
    whole, state, parts = run(rule, given), None, []
    for part in (slice(0, 5), slice(5, 6), slice(6, None)):
        gates = Gates(alpha=alpha[:, part], eta=eta[:, part], theta=theta[:, part], gamma=gamma[:, part])
        y, state = omega_memory(q[:, part], k[:, part], v[:, part], gates, tuple(weights), rule, state)
        assert state.residuals is None
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-11)


def test_the_lifted_key_may_have_another_width_than_the_value() -> None:
    rule = RULES["atlas"]
    given = leaves(rule, lifted=7)
    torch.testing.assert_close(run(rule, given, "reference"), run(rule, given), rtol=1e-9, atol=1e-11)


def test_a_read_is_the_network_alone() -> None:
    rule = RULES["atlas"]
    q, *_, first, second = leaves(rule)
    hidden = gelu(torch.einsum("hfd,bthd->bthf", second, q))
    wanted = torch.einsum("hvf,bthf->bthv", first, hidden)
    torch.testing.assert_close(read_memory(q, (first, second), rule), wanted)


def test_a_residual_that_it_cannot_add_is_refused() -> None:
    rule = replace(RULES["atlas"], residual=True)
    q, k, v, alpha, eta, theta, gamma, *weights = leaves(rule)
    gates = Gates(alpha=alpha, eta=eta, theta=theta, gamma=gamma)
    with pytest.raises(ValueError, match="the rule has residual=False; pass residual=None"):
        omega_memory(q, k, v, gates, tuple(weights), RULES["atlas"], residual=(v, v))
