"""Queries moved into the span of keys (TNT, arXiv 2511.07343 Eq 7), against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from atlas_kernels import projection
from atlas_kernels.projection import project
from tests.support.problems import assert_close, gradients


def by_token(q, k, begins, span):
    """Pi_t q_t of Eq 7, one token after the other: Pi_t = Pi_{t-1} + k_t k_t^T, from zero at a shard's first token."""
    rows, spans = [], []
    for b in range(q.shape[0]):
        Pi, out = span[b], []
        for t in range(q.shape[1]):
            outer = k[b, t].unsqueeze(-1) * k[b, t].unsqueeze(-2)
            Pi = outer if begins[b, t] else Pi + outer
            out.append((Pi @ q[b, t].unsqueeze(-1)).squeeze(-1))
        rows.append(torch.stack(out))
        spans.append(Pi)
    return torch.stack(rows), torch.stack(spans)


def drawn(tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k = draw(2, tokens, 2, 3).requires_grad_(), F.normalize(draw(2, tokens, 2, 3), dim=-1).requires_grad_()
    return q, k, draw(2, 2, 3, 3).requires_grad_(), torch.rand(2, tokens, generator=generator)


def found(of, q, k, begins, before):
    """Of a span that keys before these left: a sum of their outer products, and so symmetric."""
    y, after = of(q, k, begins, before.mT @ before)
    return {"y": y, "after": after} | gradients([y, after], {"q": q, "k": k, "before": before})


@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 13])
def test_it_is_a_loop_over_tokens(tokens, share, monkeypatch):
    """Resets anywhere, several in a block and none in several, on from a carried span; each row its own."""
    monkeypatch.setattr(projection, "BLOCK", 4)
    for seed in range(3):
        q, k, before, chance = drawn(tokens, seed)
        given = (q, k, chance < share, before)
        assert_close(found(project, *given), found(by_token, *given))


def test_the_shipped_block():
    q, k, before, chance = drawn(2 * projection.BLOCK + 5)
    given = (q, k, chance < 0.02, before)
    assert given[2].any()
    assert_close(found(project, *given), found(by_token, *given))


def test_any_cut_gives_the_whole(monkeypatch):
    monkeypatch.setattr(projection, "BLOCK", 4)
    q, k, _, chance = drawn(13)
    begins = chance < 0.2
    y, after = project(q, k, begins)
    for at in range(1, 13):
        first, span = project(q[:, :at], k[:, :at], begins[:, :at])
        second, span = project(q[:, at:], k[:, at:], begins[:, at:], span)
        assert_close({"y": torch.cat([first, second], 1), "after": span}, {"y": y, "after": after})


def test_a_query_in_the_span_stays_and_one_beside_it_is_gone():
    """Orthonormal keys: Pi is the projector onto them."""
    basis = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    k = basis[:3].view(1, 3, 1, 5)
    q = (basis[0] + 2 * basis[2] + 3 * basis[4]).expand(1, 3, 1, 5)
    y, _ = project(q, k, torch.zeros(1, 3, dtype=torch.bool))
    torch.testing.assert_close(y[0, :, 0], torch.stack([basis[0], basis[0], basis[0] + 2 * basis[2]]))


def test_what_a_reset_forgets_is_forgotten_to_the_bit():
    q, k, span, _ = drawn(12)
    begins = torch.zeros(2, 12, dtype=torch.bool)
    begins[:, 5] = True
    y, after = project(q, k, begins, span)
    with torch.no_grad():
        k[:, :5] *= 7
    again, later = project(q, k, begins, 3 * span)
    assert torch.equal(y[:, 5:], again[:, 5:]) and torch.equal(after, later)
    assert not torch.equal(y[:, :5], again[:, :5])
