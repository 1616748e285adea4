"""anchor_gradient under 1: the same memory, and an outer gradient that passes through the anchors in part or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atlas_kernels import MemoryRule, newton_schulz, omega_memory
from atlas_kernels.reference import inner_loss, memory
from atlas_kernels.reference_dual import omega_memory_dual_reference
from tests.support.problems import Problem, assert_close, compare, gradients, problem, state_tensors

CHUNK = 8
FIRST = MemoryRule(window=5, chunk=CHUNK, ns_steps=0, norm="layer", anchor_gradient=0)
DAMPED = 0.3
RULES = {
    "sum": replace(FIRST, momentum=False),
    "momentum": FIRST,
    "gated": replace(FIRST, memory="gated_mlp", norm="none"),
    "dot": replace(FIRST, loss="dot"),
    "orthogonal": replace(FIRST, ns_steps=5, ns_period=4),
    "orthogonal, gated": replace(FIRST, memory="gated_mlp", ns_steps=2, momentum=False),
    "damped": replace(FIRST, anchor_gradient=DAMPED),
    "damped, orthogonal, gated": replace(FIRST, memory="gated_mlp", ns_steps=2, ns_period=4, anchor_gradient=DAMPED),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("pair,residual", [(True, False), (False, True)])
@pytest.mark.usefixtures("backward")
def test_chunked_is_the_reference(rule, pair, residual):
    compare(problem(rule, 3 * CHUNK + 3, pair=pair, residual=residual))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_any_cut_gives_the_whole(rule, impl):
    p = problem(rule, 2 * CHUNK + 5)
    y, state = p.run(impl)
    whole = {"y": y, **state_tensors(state)}
    whole |= gradients(list(whole.values()), p.leaves())
    for at in (3, CHUNK, CHUNK + 1):
        first, middle = p.run(impl, 0, at)
        second, state = p.run(impl, at, None, middle)
        parts = {"y": torch.cat([first, second], 1), **state_tensors(state)}
        assert_close(parts | gradients(list(parts.values()), p.leaves()), whole)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_forward_is_the_same_to_the_bit(rule):
    p = problem(rule, 2 * CHUNK + 5)
    outputs = [
        (y, *s.tensors())
        for y, s in (replace(p, rule=replace(rule, anchor_gradient=a)).run("chunked") for a in (1, DAMPED, 0))
    ]
    assert all(torch.equal(a, b) for other in outputs[1:] for a, b in zip(outputs[0], other, strict=True))


def by_autograd(p: Problem) -> torch.Tensor:
    """Window 1, no momentum: the inner gradients by autograd at anchors that are in part constants, with a graph."""
    W, outputs = tuple(w.expand(p.q.shape[0], *w.shape) for w in p.weights), []
    for t in range(p.q.shape[1]):
        if t % CHUNK == 0:
            share = p.rule.anchor_gradient
            A = tuple((share * w + (1 - share) * w.detach()).requires_grad_() for w in W)
        q, k, v = (x[:, t : t + 1] for x in (p.q, p.k, p.v))
        gamma = p.gates.gamma[:, t, :, 0]
        loss = (gamma * inner_loss(p.rule, A, k, v, k)[:, 0]).sum()
        G = torch.autograd.grad(loss, A, create_graph=True)
        alpha, eta = (g[:, t, :, None, None] for g in (p.gates.alpha, p.gates.eta))
        W = tuple(alpha * w - eta * newton_schulz(g, p.rule.ns_steps) for w, g in zip(W, G, strict=True))
        outputs.append(memory(p.rule, W, q, q))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("memory_kind,norm", [("mlp", "layer"), ("gated_mlp", "none")])
@pytest.mark.parametrize("ns_steps", [0, 3])
@pytest.mark.parametrize("share", [0, DAMPED])
def test_gradients_are_autograds_at_anchors_that_are_constant_in_part(memory_kind, norm, ns_steps, share):
    rule = replace(FIRST, memory=memory_kind, norm=norm, window=1, momentum=False, ns_steps=ns_steps)
    rule = replace(rule, anchor_gradient=share)
    p = problem(rule, 2 * CHUNK + 3)
    leaves = {name: leaf for name, leaf in p.leaves().items() if name != "theta"}
    expected, (ours, _) = by_autograd(p), p.run("chunked")
    found = gradients([ours], leaves)
    assert_close({"y": ours, **found}, {"y": expected, **gradients([expected], leaves)})
    exact, _ = replace(p, rule=replace(rule, anchor_gradient=1)).run("chunked")
    assert not torch.allclose(gradients([exact], leaves)["k"], found["k"])


@pytest.mark.parametrize("memory_kind", ["mlp", "gated_mlp"])
@pytest.mark.parametrize("kernel", ["exponential", "softmax"])
@pytest.mark.parametrize("share", [0, DAMPED])
def test_the_dual_form(memory_kind, kernel, share):
    rule = replace(FIRST, memory=memory_kind, kernel=kernel, momentum=False, window=3, chunk=4, anchor_gradient=share)
    p = problem(rule, 11, batch=1, heads=2)
    y = omega_memory_dual_reference(rule, p.weights, p.inputs())
    ours, _ = p.run("chunked")
    assert_close({"y": ours, **gradients([ours], p.leaves())}, {"y": y, **gradients([y], p.leaves())})


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_packed_documents(rule):
    p = problem(rule, 35)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([3, 1, 9, 8, 14], [20, 15])])
    results = []
    for impl in ("reference", "chunked"):
        y, _ = omega_memory(p.q, p.k, p.v, p.gates, p.weights, rule, impl=impl, positions=positions)
        results.append({"y": y, **gradients([y], p.leaves())})
    assert_close(results[1], results[0])


def test_what_it_is_for():
    """Over many chunks of a memory that forgets, the exact gradient explodes, and these do not."""
    torch.manual_seed(0)
    p = problem(replace(FIRST, momentum=False, window=4), 96 * CHUNK, batch=1, heads=1, key=16, value=16, hidden=32)
    with torch.no_grad():
        p.gates.alpha.fill_(0.97)
        p.gates.eta.fill_(0.1 / (4 * CHUNK))
        p.gates.gamma.fill_(1.0)
    sizes = {}
    for share in (1, 0.1, 0):
        y, _ = replace(p, rule=replace(p.rule, anchor_gradient=share)).run("chunked")
        sizes[share] = gradients([y], p.leaves())["k"].norm().item()
    assert sizes[1] > 1e3 * max(sizes[0], sizes[0.1]), sizes


def test_a_linear_memory_has_no_use_for_it():
    with pytest.raises(ValueError, match="anchor_gradient=0 belongs to deep memories"):
        MemoryRule("linear", anchor_gradient=0)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_it_is_a_share(share):
    with pytest.raises(ValueError, match=f"anchor_gradient={share} is a share: 0 .first order. to 1 .exact."):
        MemoryRule(anchor_gradient=share)
