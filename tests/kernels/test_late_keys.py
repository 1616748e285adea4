"""Keys that start as the query of the token before them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atlas_kernels import late_keys, short_convolution

HEADS, WIDTH, HIDDEN, TAPS, TOKENS = 2, 4, 6, 4, 9


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    rows = torch.randn(HEADS, 4, WIDTH, HIDDEN, dtype=torch.float64)
    return rows, torch.randn(HEADS, 3 * WIDTH, TAPS, dtype=torch.float64)


def convolved(rows: torch.Tensor, taps: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    qkv = torch.einsum("btd,hpkd->bthpk", x, rows[:, :3])
    return short_convolution(qkv, taps, None)[:3]


def test_a_key_is_the_query_of_the_token_before() -> None:
    """Up to what it has of its own token; with a filter that has none of the token four back."""
    rows, taps = drawn()
    taps[:, :WIDTH, 0] = 0.0  # a query's oldest tap: the key's filter has no room for it one token later
    taps[:, WIDTH : 2 * WIDTH, -1] = 0.0  # nothing of its own token
    x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64)
    q, k, _ = convolved(*late_keys(rows, taps), x)
    torch.testing.assert_close(k[:, 1:], q[:, :-1])


def test_queries_and_values_stay_and_nothing_given_changes() -> None:
    rows, taps = drawn()
    given = rows.clone(), taps.clone()
    x = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
    before, after = convolved(rows, taps, x), convolved(*late_keys(rows, taps), x)
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[2], before[2])
    assert not torch.allclose(after[1], before[1])
    assert torch.equal(rows, given[0]) and torch.equal(taps, given[1])


def test_a_first_tokens_key_has_a_length_and_a_calm_gradient() -> None:
    """A filter with nothing of the own token gave a zero to divide by: outer gradients of a million."""
    rows, taps = late_keys(*drawn())
    x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    _, k, _ = convolved(rows, taps, x)
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(1, TOKENS, HEADS, dtype=torch.float64))
    (k * F.normalize(torch.randn_like(k), dim=-1)).sum().backward()
    assert x.grad is not None and x.grad.norm() < 1e3
