"""A start in which a read is the token that its value was."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from atlas_kernels import SILU_IS_ONE, copying, gated_norm, short_convolution

HEADS, WIDTH, HIDDEN, TAPS, TOKENS = 2, 4, 32, 4, 9


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    rows = torch.randn(HEADS, 4, WIDTH, HIDDEN, dtype=torch.float64)
    return rows, torch.randn(HEADS, 3 * WIDTH, TAPS, dtype=torch.float64)


def test_a_value_is_its_token_and_the_output_says_it() -> None:
    """Where nothing of the drawn filter is left, and SiLU is out of the way: W_v^T W_v of the token."""
    rows, taps = drawn()
    taps[:, 2 * WIDTH :] = 0.0
    filters, out = copying(rows, taps)
    tokens = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64)
    qkv = torch.einsum("btd,hpkd->bthpk", tokens, rows[:, :3])
    qkv[..., 2, :] += 90.0  # where SiLU is the identity
    v = short_convolution(qkv, filters, None)[2] - 90.0
    said = v.flatten(2) @ out.mT
    values = rows[:, 2].flatten(0, 1)
    torch.testing.assert_close(said, tokens @ (values.mT @ values))


def test_queries_and_keys_stay_and_nothing_given_changes() -> None:
    rows, taps = drawn()
    given = rows.clone(), taps.clone()
    filters, out = copying(rows, taps)
    assert torch.equal(filters[:, : 2 * WIDTH], taps[:, : 2 * WIDTH])
    assert out.shape == (HIDDEN, HEADS * WIDTH)
    assert torch.equal(out[:, WIDTH:], rows[1, 2].mT)
    assert torch.equal(rows, given[0]) and torch.equal(taps, given[1])


def test_an_open_gate_lets_a_read_through() -> None:
    y = torch.randn(2, 5, HEADS, WIDTH, dtype=torch.float64)
    out = gated_norm(y, torch.full_like(y, SILU_IS_ONE), y.new_ones(HEADS, WIDTH), 1e-6)
    torch.testing.assert_close(out, F.rms_norm(y, (WIDTH,), eps=1e-6), rtol=1e-6, atol=1e-6)
