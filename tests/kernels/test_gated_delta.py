"""The gated delta rule as a layer calls it: its decay, its starts, cuts and documents.

Against the papers' recurrence it is held in tests/mixers/test_baseline_mixers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atlas_kernels.gated_delta import LEAST_LOG_DECAY, RATES, STEPS, gated_delta_rule, initial_decay, log_decay


def problem(tokens: int = 40) -> list[Tensor]:
    """q, k, v, beta, log alpha of 2 sequences and 3 heads."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, tokens, 3, 8, generator=generator, dtype=torch.float64)
    q, k = torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1)
    beta, decay = torch.rand(2, 2, tokens, 3, generator=generator, dtype=torch.float64)
    return [q, k, v, beta, -decay]


def test_the_decay_is_its_formula_down_to_the_least() -> None:
    logits = torch.tensor([[[-1.0, 0.5], [3.0, 400.0]]], dtype=torch.float64)
    rate_log, bias = torch.tensor([0.2, 1.0]).double(), torch.tensor([0.1, -0.4]).double()
    expected = -rate_log.exp() * (1 + (logits + bias).exp()).log()
    assert expected[0, 1, 1] < LEAST_LOG_DECAY
    expected[0, 1, 1] = LEAST_LOG_DECAY
    torch.testing.assert_close(log_decay(logits, rate_log, bias), expected, rtol=1e-12, atol=0)
    assert log_decay(logits.float(), rate_log.bfloat16(), bias.bfloat16()).dtype == torch.float32


def test_it_starts_within_its_ranges() -> None:
    torch.manual_seed(0)
    rate_log, bias = initial_decay(2000)
    rate, step = rate_log.exp(), torch.nn.functional.softplus(bias)
    for found, (low, high) in ((rate, RATES), (step, STEPS)):
        assert found.shape == (2000,) and found.min() >= low * 0.999 and found.max() <= high * 1.001
    # Steps are drawn evenly in their logarithm: half of them lie below the geometric mean.
    assert abs((step < (STEPS[0] * STEPS[1]) ** 0.5).float().mean() - 0.5) < 0.05


def test_no_decay_is_a_decay_of_one() -> None:
    *given, log_alpha = problem()
    y, memory = gated_delta_rule(*given)
    same, after = gated_delta_rule(*given, torch.zeros_like(log_alpha))
    torch.testing.assert_close(y, same, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(memory.weights[0], after.weights[0], rtol=1e-12, atol=1e-12)


def test_over_a_cut_it_goes_on_and_at_a_document_it_begins_anew() -> None:
    given = problem()
    whole, _ = gated_delta_rule(*given)
    first, memory = gated_delta_rule(*(t[:, :13] for t in given))
    second, _ = gated_delta_rule(*(t[:, 13:] for t in given), memory=memory)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-10)
    alone, _ = gated_delta_rule(*(t[:, 13:] for t in given))
    positions = torch.cat([torch.arange(13), torch.arange(27)]).expand(2, 40)
    packed, _ = gated_delta_rule(*given, positions)
    torch.testing.assert_close(packed, torch.cat([first, alone], 1), rtol=1e-10, atol=1e-10)
