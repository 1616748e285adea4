"""Memories that begin anew every shard, over ranks, against one process in float64: whole shards wait for no one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from atlas_megatron.config import Config
from tests.support import context_models as models
from tests.support import processes

TOLERANCE = 1e-10  # as in test_context.py
BESIDE = {"locals": ("2/6", "4/12"), "projection": True}
STALE = {"read": "chunk", **BESIDE}
ANEW = {"shard": 12, "chunk": 4}
NODES = {"devices_per_node": 2}
# (layers, preset, keys of the memory, ranks, mode)
CASES: list[tuple[str, str, dict[str, Any], int, str]] = [
    *[("M-", preset, ANEW, 4, mode) for preset in ("titans", "atlas") for mode in ("heads", "handoff")],
    ("M-A-", "omeganet", ANEW, 4, "heads+handoff"),
    ("M-", "delta", {"shard": 6}, 2, "handoff"),
    ("M-", "atlas", {**ANEW, "ns_step": "sum"}, 2, "handoff"),
    *[("M-", "atlas", STALE, 4, mode) for mode in ("heads", "handoff", "heads+handoff")],
    *[("M-", preset, BESIDE, 4, "handoff") for preset in ("atlas++", "omeganet", "titans", "ttt", "dla", "swla")],
    ("A-*-", "titans", STALE, 4, "handoff"),
    # What the last rank's only chunk writes is read by no one, and has a gradient of zero there.
    ("M-", "titans", {**STALE, "chunk": 12}, 4, "handoff"),
    ("M-", "atlas", {**STALE, "write_gate": True, "ns_step": "sum", "projection": False}, 2, "handoff"),
    ("M-", "titans", {**ANEW, **BESIDE}, 2, "heads"),
    ("M-", "omeganet", {**ANEW, **BESIDE, "anchor_gradient": 0.5}, 4, "handoff"),
]


def spread(case: tuple[str, str, dict[str, Any], int, str]) -> Config:
    layers, preset, keys, ranks, mode = case
    return models.spread(models.small(layers, preset, **keys), ranks, mode, **NODES)


@pytest.fixture(scope="module")
def found() -> dict[int, dict[int, Any]]:
    """Losses and gradients of each case, on one process and on its ranks."""
    alone = processes.run(1, models.losses_and_gradients, [models.small(c[0], c[1], **c[2]) for c in CASES])[0]
    together: dict[int, Any] = {}
    for ranks in (2, 4):
        own = [number for number, c in enumerate(CASES) if c[3] == ranks]
        answers = processes.run(ranks, models.losses_and_gradients, [spread(CASES[n]) for n in own])[0]
        together |= zip(own, answers, strict=True)
    return {1: dict(enumerate(alone)), 2: together}


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{c[0]} {c[1]} {' '.join(c[2])} {c[3]} {c[4]}" for c in CASES]
)
def test_a_sequence_over_ranks_is_the_sequence(number: int, found: dict[int, dict[int, Any]]) -> None:
    (losses, gradients), (same, own) = found[1][number], found[2][number]
    torch.testing.assert_close(same, losses, rtol=1e-6, atol=1e-6)  # core takes the loss of a token in float32
    assert gradients.keys() == own.keys()
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() <= TOLERANCE * gradient.norm(), name


def test_a_stream_goes_on_over_ranks() -> None:
    """Pieces of a sequence, each spread over the ranks, with a state between them: logits and gradients."""
    beside = {"locals": ("2/4", "4/4"), "projection": True}
    keys: list[tuple[str, str, dict[str, Any]]] = [
        ("M-", "titans", {"shard": 4, "chunk": 4}),
        ("M-", "atlas", {"read": "chunk", **beside}),
        ("A-", "omeganet", beside),
    ]
    configs = [models.small(layers, preset, **own) for layers, preset, own in keys]
    modes = ["heads", "heads+handoff", "handoff"]
    (alone,) = processes.run(1, models.streamed, configs)
    shared = [models.spread(c, 4, mode, **NODES) for c, mode in zip(configs, modes, strict=True)]
    together = processes.run(4, models.streamed, shared)[0]
    for own, (logits, gradients), (same, theirs) in zip(keys, alone, together, strict=True):
        torch.testing.assert_close(same, logits, msg=lambda text, k=own: f"{k}: {text}")
        for name, gradient in gradients.items():
            assert (theirs[name] - gradient).norm() <= TOLERANCE * gradient.norm(), (own, name)


def test_a_pass_that_is_recomputed() -> None:
    config = models.small("M-", "titans", **STALE)
    config = replace(config, train=replace(config.train, recompute=True))
    ((losses, gradients),) = processes.run(1, models.losses_and_gradients, [config])[0]
    ((same, own),) = processes.run(2, models.losses_and_gradients, [models.spread(config, 2, "handoff")])[0]
    torch.testing.assert_close(same, losses, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() <= TOLERANCE * gradient.norm(), name


@pytest.mark.parametrize("keys", [{"shard": 8, "chunk": 4}, {"locals": ("4/8",)}], ids=["shard", "locals"])
def test_a_piece_that_cuts_a_shard_is_refused_on_every_rank(keys: dict[str, Any]) -> None:
    """One that went on would wait for the others for ever."""
    config = models.spread(models.small("M-", "titans", **keys), 4, "handoff")
    for said in processes.run(4, models.refusal_of_a_stream, config):
        assert "4 context-parallel ranks read 12 tokens each from token 0 on, which cuts a shard of 8 tokens" in said
        assert "(memory.shard, memory.locals); give each rank whole shards" in said
