"""Attention's functions against torch's own with the mask written out, in float64, with every gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_kernels.attention import (
    Persistent,
    attend,
    banded_attention,
    causal_attention,
    persistent_of,
    rotary,
    rotate,
    within_segment,
)

BATCH, HEADS, WIDTH = 2, 3, 8


def drawn(tokens: int, before: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q of so many tokens, k and v of as many more before them."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((BATCH, HEADS, tokens, WIDTH), *[(BATCH, HEADS, before + tokens, WIDTH)] * 2)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    return q, k, v


def learned_of(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(HEADS, 2, number, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()


def mask(tokens: int, before: int, window: int | None = None, positions: Tensor | None = None) -> Tensor:
    """[B, 1, T, P+T]: which keys each query sees, one by one."""
    seen = torch.zeros(BATCH, 1, tokens, before + tokens, dtype=torch.bool)
    for row in range(BATCH):
        for query in range(tokens):
            for key in range(before + tokens):
                back = before + query - key
                own = positions is None or back <= positions[row, query]
                seen[row, 0, query, key] = back >= 0 and own and (window is None or back < window)
    return seen


def documents(tokens: int) -> Tensor:
    """The first row begins inside a document, and holds two more; the second is one."""
    first = torch.cat([torch.arange(4, 4 + tokens // 3), torch.arange(2), torch.arange(tokens - tokens // 3 - 2)])
    return torch.stack([first, torch.arange(tokens)])


def assert_same(found: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    """Outputs, and the gradients of one weighted sum of them."""
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(7), dtype=found.dtype)
    gradients = (torch.autograd.grad((y * weight).sum(), leaves, retain_graph=True) for y in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("tokens", "before"), [(1, 0), (1, 6), (9, 0), (9, 4)])
@pytest.mark.parametrize("window", [None, 3, 50])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_causal_attention_is_torchs(tokens: int, before: int, window: int | None, packed: bool) -> None:
    leaves = drawn(tokens, before)
    positions = documents(tokens)[:, -tokens:] if packed and tokens > 1 else None
    found = causal_attention(*leaves, positions=positions, window=window)
    expected = F.scaled_dot_product_attention(*leaves, attn_mask=mask(tokens, before, window, positions))
    assert_same(found, expected, leaves)


@pytest.mark.parametrize(("tokens", "window"), [(1, 4), (7, 16), (16, 16), (17, 16), (33, 5), (12, 1)])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_banded_attention_is_torchs_with_a_band_for_a_mask(tokens: int, window: int, packed: bool) -> None:
    before = min(window - 1, 3)
    leaves = drawn(tokens, before)
    positions = documents(tokens) if packed and tokens > 1 else None
    expected = F.scaled_dot_product_attention(*leaves, attn_mask=mask(tokens, before, window, positions))
    assert_same(banded_attention(*leaves, window, positions=positions), expected, leaves)


@pytest.mark.parametrize("number", [1, 3])
def test_persistent_tokens_are_more_keys_of_one_softmax(number: int) -> None:
    """Which the queries meet as they are, not rotated."""
    tokens, window = 13, 5
    q, k, v = drawn(tokens)
    plain, learned = drawn(tokens)[0].detach().flip(2).clone().requires_grad_(), learned_of(number)
    keys, values = learned.unbind(1)
    leaves = (q, k, v, plain, learned)
    for limit in (None, window):
        rotated = (q @ k.mT).masked_fill(~mask(tokens, 0, limit), -math.inf)
        weights = (torch.cat([plain @ keys.mT, rotated], -1) / math.sqrt(WIDTH)).softmax(-1)
        expected = weights @ torch.cat([values.expand(BATCH, -1, -1, -1), v], 2)
        persistent = persistent_of(learned, plain)
        assert_same(causal_attention(q, k, v, persistent, window=limit), expected, leaves)
        if limit is not None:
            assert_same(banded_attention(q, k, v, limit, persistent), expected, leaves)


def test_a_layer_without_persistent_tokens_has_none() -> None:
    q, k, v = drawn(5)
    assert persistent_of(None, q) is None
    seen = mask(5, 0)
    none = Persistent(learned_of(0), q)
    torch.testing.assert_close(attend(q, k, v, seen, none), attend(q, k, v, seen, None), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("read", [0, 6])
@pytest.mark.parametrize("number", [0, 2])
def test_a_segment_attends_to_itself_and_to_its_answers(read: int, number: int) -> None:
    """Query by query over the keys that it may see, none of them masked."""
    tokens = 5
    q, k, v = drawn(tokens, read)
    _, answered_k, answered_v = (t.detach().flip(0).clone().requires_grad_() for t in drawn(tokens, read))
    learned = learned_of(number)
    rows = []
    for t in range(tokens):
        upto = read + t + 1
        keys, values = (torch.cat([a[:, :, :upto], b[:, :, :upto]], 2) for a, b in ((k, answered_k), (v, answered_v)))
        own, own_values = (part.expand(BATCH, -1, -1, -1) for part in learned.unbind(1))
        keys, values = torch.cat([own, keys], 2), torch.cat([own_values, values], 2)
        rows.append(F.scaled_dot_product_attention(q[:, :, [t]], keys, values))
    persistent = persistent_of(learned, q) if number else None
    found = within_segment(q, (k, answered_k), (v, answered_v), persistent)
    assert_same(found, torch.cat(rows, 2), (q, k, v, answered_k, answered_v, *([learned] if number else [])))


def test_rotation_is_a_complex_product() -> None:
    positions = torch.tensor([[0, 1, 2, 40], [7, 8, 0, 1]])
    x = torch.randn(2, HEADS, 4, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    cos, sin = rotary(positions[:, None], WIDTH, 100.0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (2, 1, 4, WIDTH // 2)
    frequency = torch.tensor([100.0 ** (-2 * i / WIDTH) for i in range(WIDTH // 2)], dtype=torch.float64)
    turned = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * positions[:, None, :, None] * frequency)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, (cos, sin)), expected, rtol=1e-6, atol=1e-6)  # angles' cosines are float32
    assert rotate(x.bfloat16(), (cos, sin)).dtype == torch.bfloat16
