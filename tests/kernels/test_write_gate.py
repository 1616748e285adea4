"""The gate that writes and forgets: exact ends, what it keeps, what its budget adds to a gradient."""

from __future__ import annotations

import pytest
import torch

from atlas_kernels import Gates, MemoryRule, budgeted, omega_memory, retained, write_gate, write_logit
from atlas_kernels.write_gate import FLOOR
from tests.support.problems import problem


def test_it_reaches_its_ends_exactly():
    w = write_gate(torch.tensor([-30.0, -3.0, 0.0, 3.0, 30.0]))
    assert w[:2].tolist() == [0, 0] and w[2] == 0.5 and w[3:].tolist() == [1, 1]
    for start in (0.01, 0.1, 0.9):
        assert write_gate(torch.tensor(write_logit(start), dtype=torch.float64)).item() == pytest.approx(start)


def test_what_writes_nothing_forgets_nothing():
    logits = torch.tensor([-20.0, 0.0, 2.0], dtype=torch.float64)
    assert torch.equal(retained(logits, torch.zeros(3, dtype=torch.float64)), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(retained(logits, torch.full((3,), 0.3, dtype=torch.float64)), logits.sigmoid() ** 0.3)


def test_the_budget_is_a_term_of_the_loss():
    torch.manual_seed(0)
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    own = torch.randn(40, dtype=torch.float64)
    w = write_gate(x)
    (explicit,) = torch.autograd.grad((own * w).sum() + 0.7 * (w + FLOOR).sqrt().sum(), x)
    (ours,) = torch.autograd.grad((own * budgeted(write_gate(x), 0.7)).sum(), x)
    assert torch.allclose(ours, explicit, atol=1e-14)
    assert budgeted(w.detach(), 0.7) is not None and torch.equal(budgeted(w, 0.7), w)


@pytest.mark.parametrize(
    "rule",
    [
        MemoryRule(window=5, chunk=8, ns_steps=3, ns_period=4, ns_step="sum"),
        MemoryRule(window=5, chunk=8, ns_steps=0, momentum=False, norm="layer"),
    ],
    ids=["orthogonal", "raw"],
)
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_memory_keeps_itself_over_tokens_that_write_nothing(rule, impl):
    """To the bit, whatever they bring: decay and steps of 0, over chunks and cuts."""
    p = problem(rule, 40)
    keep = torch.ones_like(p.gates.alpha)
    alpha, eta = p.gates.alpha.detach().clone(), p.gates.eta.detach().clone()
    alpha[:, 8:], eta[:, 8:] = keep[:, 8:], 0.0
    gates = Gates(alpha, eta, p.gates.theta, p.gates.gamma)
    _, early = omega_memory(p.q[:, :8], p.k[:, :8], p.v[:, :8], _first(gates, 8), p.weights, rule, impl=impl)
    _, late = omega_memory(p.q, p.k, p.v, gates, p.weights, rule, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(early.weights, late.weights, strict=True))


def _first(gates: Gates, tokens: int) -> Gates:
    return Gates(*(gate[:, :tokens] for gate in vars(gates).values()))
