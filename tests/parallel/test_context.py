"""Context parallelism against one process: the exchanges alone, then whole models, all gradients, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from atlas_megatron.config import Config
from atlas_megatron.config.checks import validate
from atlas_megatron.config.context_levels import context_levels
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.parallel.scan import slicing
from tests.support import context_exchanges as exchanges
from tests.support import context_models as models
from tests.support import processes

RANKS = 4
# Relative RMS of a gradient: rounding of float64, which Newton-Schulz blows up.
TOLERANCE = 1e-10
COUNTS = [0, 2, exchanges.LENGTH, 12, 40, None]


@pytest.mark.parametrize("first", [False, True], ids=["from nothing", "from a state"])
def test_the_halo_is_what_comes_before(first: bool) -> None:
    found = processes.run(RANKS, exchanges.halos, COUNTS, first)
    whole, ahead = exchanges.whole(RANKS), exchanges.drawn(2, 4, 3, seed=1)
    for number, count in enumerate(COUNTS):
        sequence = whole.clone().requires_grad_()
        held = ahead.clone().requires_grad_()
        joined = torch.cat([held, sequence], 1) if first else sequence
        begins = joined.shape[1] - whole.shape[1]
        loss = torch.zeros((), dtype=torch.float64)
        for rank in range(RANKS):
            start, end = begins + rank * exchanges.LENGTH, begins + (rank + 1) * exchanges.LENGTH
            seen = joined[:, 0 if count is None else max(0, start - count) : end]
            assert torch.equal(found[rank][number][0], seen[:, : -exchanges.LENGTH])
            loss = loss + (seen * exchanges.weights(seen.shape[1], rank)).sum()
        loss.backward()
        assert sequence.grad is not None
        torch.testing.assert_close(torch.cat([f[number][1] for f in found], 1), sequence.grad)
        if first and count != 0:
            torch.testing.assert_close(sum(f[number][2] for f in found), held.grad)


def test_heads_are_exchanged_and_come_back() -> None:
    found = processes.run(RANKS, exchanges.heads_and_back)
    whole = exchanges.heads_input(RANKS)
    assert torch.equal(torch.cat([f["share"] for f in found], 2), whole)
    assert torch.equal(torch.cat([f["back"] for f in found], 1), whole.square())
    scale = torch.arange(1, RANKS + 1).repeat_interleave(exchanges.LENGTH).view(1, -1, 1, 1)
    torch.testing.assert_close(torch.cat([f["gradient"] for f in found], 1), 2 * whole * scale)
    assert all(torch.equal(f["places"][0], torch.arange(RANKS * exchanges.LENGTH)) for f in found)


def test_a_state_is_handed_on_and_its_gradient_back() -> None:
    found = processes.run(RANKS, exchanges.handed_on)
    xs = [exchanges.drawn(3, seed=rank).requires_grad_() for rank in range(RANKS)]
    state, loss = torch.ones(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for rank, x in enumerate(xs):
        state = (state + 1) * x
        loss = loss + (state * (rank + 1)).sum()
        torch.testing.assert_close(found[rank]["y"], state.detach())
        assert found[rank]["count"].tolist() == [rank + 1] * 2 and found[rank]["count"].dtype == torch.float32
    loss.backward()
    for rank, x in enumerate(xs):
        torch.testing.assert_close(found[rank]["gradient"], x.grad)


def test_the_last_rank_tells_the_others() -> None:
    found = processes.run(RANKS, exchanges.last_state)
    own = exchanges.drawn(2, 3, seed=RANKS - 1)
    assert all(torch.equal(f["weights"], own) for f in found)
    assert {f["position"] for f in found} == {RANKS - 1}
    assert all(f["places"].tolist() == [RANKS - 1] for f in found)
    used = sum(rank + 1 for rank in range(RANKS)) + RANKS * (2 * 3 + 1)
    torch.testing.assert_close(found[-1]["gradient"], torch.full_like(own, used))
    assert not any(f["gradient"].any() for f in found[:-1])


PACKED = {"data": replace(Config().data, packed=True)}
LIFTED = [name for name, preset in PRESETS.items() if preset["kernel"] == "lifted"]
SLICED = {"context_slices": 8}
NODES = {"devices_per_node": 2}
# (layers, preset, mode, other parallel keys, whether documents are packed)
CASES: list[tuple[str, str, str, dict[str, Any], bool]] = [
    *[("M-", preset, "heads", {}, False) for preset in PRESETS],
    *[(layers, "atlas", "heads", {}, packed) for layers in ("M-*-", "A-", "D-G-") for packed in (False, True)],
    *[("M-", preset, "handoff", SLICED, False) for preset in LIFTED],
    *[(layers, "atlas", "handoff", {}, packed) for layers in ("M-*-", "A-", "D-G-") for packed in (False, True)],
    *[("M-", preset, "handoff", {}, True) for preset in ("titans", "omeganet", "delta", "swla")],
    *[("R-L-F-", "atlas", "handoff", {}, packed) for packed in (False, True)],
    *[(layers, "atlas", "handoff", {}, False) for layers in ("C-", "C-M-")],
    *[("M-A-D-G-", "atlas", "heads+handoff", NODES, packed) for packed in (False, True)],
]  # fmt: skip


def case(layers: str, preset: str, packed: bool) -> Config:
    config = models.small(layers, preset)
    if "C" in layers:
        config = replace(config, attention=replace(config.attention, persistent=2))
    return replace(config, **PACKED) if packed else config


@pytest.fixture(scope="module")
def found() -> dict[int, list[Any]]:
    """Losses and gradients of every case, on one process and on RANKS."""
    alone = [case(layers, preset, packed) for layers, preset, _, _, packed in CASES]
    shared = [
        models.spread(config, RANKS, mode, **keys) for config, (_, _, mode, keys, _) in zip(alone, CASES, strict=True)
    ]
    return {
        1: processes.run(1, models.losses_and_gradients, alone)[0],
        RANKS: processes.run(RANKS, models.losses_and_gradients, shared)[0],
    }


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c[0]} {c[1]} {c[2]}{' packed' * c[4]}" for c in CASES])
def test_a_sequence_over_ranks_is_the_sequence(number: int, found: dict[int, list[Any]]) -> None:
    (losses, gradients), (same, own) = found[1][number], found[RANKS][number]
    torch.testing.assert_close(same, losses, rtol=1e-6, atol=1e-6)  # core takes the loss of a token in float32
    assert gradients.keys() == own.keys()
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() <= TOLERANCE * gradient.norm(), name


def test_a_pass_that_is_recomputed_hands_on_twice() -> None:
    config = models.small("M-A-*-R-")
    config = replace(config, train=replace(config.train, recompute=True))
    ((losses, gradients),) = processes.run(1, models.losses_and_gradients, [config])[0]
    shared = models.spread(config, RANKS, "handoff", **SLICED)
    ((same, own),) = processes.run(RANKS, models.losses_and_gradients, [shared])[0]
    torch.testing.assert_close(same, losses, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() <= TOLERANCE * gradient.norm(), name


def test_gradients_end_at_the_same_tokens_over_ranks() -> None:
    """Inside of a rank's tokens and at its borders, which a gradient must not pass either."""
    cases = [("M-A-", "handoff", 16, False), ("M-", "handoff", 24, True), ("C-", "handoff", 16, False)]
    cases += [("M-", "heads+handoff", 24, False)]
    alone = []
    for layers, _, reach, packed in cases:
        config = case(layers, "atlas", packed)
        alone.append(replace(config, train=replace(config.train, gradient_reach=reach)))
    shared = [models.spread(config, RANKS, mode, **NODES) for config, (_, mode, *_) in zip(alone, cases, strict=True)]
    whole = [replace(config, train=replace(config.train, gradient_reach=0)) for config in alone]
    expected = processes.run(1, models.losses_and_gradients, [*alone, *whole])[0]
    together = processes.run(RANKS, models.losses_and_gradients, shared)[0]
    for one, many, (_, everything) in zip(expected, together, expected[len(cases) :], strict=False):
        torch.testing.assert_close(many[0], one[0], rtol=1e-6, atol=1e-6)
        for name, gradient in one[1].items():
            assert (many[1][name] - gradient).norm() <= TOLERANCE * gradient.norm(), name
        assert any((gradient - everything[name]).norm() > 1e-6 * gradient.norm() for name, gradient in one[1].items())


def test_a_stream_goes_on_over_ranks() -> None:
    """Pieces of a sequence, each spread over the ranks, with a state between them: logits and gradients."""
    configs = [
        models.small("M-*-"),
        models.small("M-", "dot"),
        models.small("A-D-G-"),
        models.small("R-L-F-"),
        models.small("C-"),
    ]
    modes = ["heads+handoff", "heads", "handoff", "handoff", "handoff"]
    (alone,) = processes.run(1, models.streamed, configs)
    together = processes.run(
        RANKS, models.streamed, [models.spread(c, RANKS, m, **NODES) for c, m in zip(configs, modes, strict=True)]
    )[0]
    for config, (logits, gradients), (same, own) in zip(configs, alone, together, strict=True):
        torch.testing.assert_close(same, logits, msg=lambda text, c=config: f"{c.model.pattern}: {text}")
        for name, gradient in gradients.items():
            assert (own[name] - gradient).norm() <= TOLERANCE * gradient.norm(), (config.model.pattern, name)


def test_slices_are_equal_and_cut_heads_first() -> None:
    assert slicing(batch=2, heads=4, slices=1) == (2, 4)
    assert slicing(batch=2, heads=4, slices=2) == (2, 2)
    assert slicing(batch=2, heads=4, slices=8) == (1, 1)
    assert slicing(batch=3, heads=6, slices=4) == (3, 2)
    assert slicing(batch=4, heads=3, slices=7) == (2, 1)


@pytest.mark.parametrize(
    ("context", "mode", "node", "expected"),
    [
        (4, "auto", 0, (4, 1)),
        (8, "auto", 0, (4, 2)),
        (8, "auto", 2, (2, 4)),
        (4, "handoff", 0, (1, 4)),
        (4, "heads+handoff", 0, (2, 2)),
    ],
)
def test_what_a_mode_means(
    context: int, mode: str, node: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    config = models.spread(models.small("M-"), context, mode, devices_per_node=node)
    assert context_levels(config) == expected


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (models.spread(models.small("M-"), 8, "heads"), "parallel.context_mode='heads' cannot exchange 4 heads"),
        (models.spread(models.small("M-"), 2, "heads+handoff"), "'heads\\+handoff' cannot exchange"),
        (models.spread(models.small("M-"), 5), "model.seq_length=48 does not divide by parallel.context=5"),
        (models.spread(models.small("M-", "dot"), 2, "handoff"), "is not handed on"),
        (models.spread(models.small("C-"), 3), "C layers want whole segments"),
        (models.spread(models.small("M-"), 2, "ring"), "context_mode='ring' is unknown"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(config: Config, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        validate(config, world_size=config.parallel.context)
