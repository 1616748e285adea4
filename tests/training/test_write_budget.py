"""How much a written token counts, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atlas_megatron.training.write_budget import budget_at, weight_of_token
from tests.support.small_model import SMALL


@pytest.mark.parametrize(
    ("late", "expected"),
    [(0.0, {1: 0.004, 25: 0.1, 50: 0.1, 100: 0.1}), (0.5, {10: 0.04, 25: 0.1, 50: 0.1, 70: 0.3, 90: 0.5, 100: 0.5})],
)
def test_the_budget_rises_early_and_once_more_late(late: float, expected: dict[int, float]) -> None:
    config = replace(SMALL, train=replace(SMALL.train, steps=100, write_budget=0.1, late_write_budget=late))
    assert {step: budget_at(config, step) for step in expected} == pytest.approx(expected)


def test_the_tokens_of_a_step_share_the_budget() -> None:
    """Over all layers with a memory and their heads."""
    model = replace(SMALL.model, pattern="M-*-A-")
    config = replace(SMALL, model=model, train=replace(SMALL.train, steps=100, write_budget=0.1))
    gates = 2 * config.memory.heads * 640
    assert weight_of_token(config, 100, 640) * gates == pytest.approx(0.1)
