"""The whole model of a live, split one: the same weights, and the same logits, as one process has."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from atlas_megatron.checkpoint.whole_model import WholeModel
from atlas_megatron.config import Config
from atlas_megatron.inference import streaming
from atlas_megatron.mixers.stream import StreamContext
from atlas_megatron.model.build import build_chunks
from atlas_megatron.parallel import world
from tests.support.layouts import BASELINES, BASES, LAYOUTS, ONE, fits
from tests.support.processes import run

KINDS = BASES | {"baselines": BASELINES}
SHORT = ("sequence", "interleaved", "context handoff")  # what `make test` tries


def moved(config: Config) -> list:
    """A model that has left its start: what it began with is not what is gathered."""
    chunks = build_chunks(config)
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.mul_(1.5)
    return chunks


def wholes(rank: int, cases: list[Config]) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Of each layout: the gathered parameters, and the logits of a text of 40 tokens, read in two pieces."""
    found = []
    for config in cases:
        world.form_groups(config)
        world.seed(1234)
        chunks = moved(config)
        before = [p.detach().clone() for chunk in chunks for p in chunk.parameters()]
        model = WholeModel(config).of(chunks)
        tokens = torch.arange(40).remainder(11).view(1, 40)
        context = StreamContext()
        with torch.no_grad():
            logits = torch.cat([streaming.read(model, piece, context) for piece in tokens.split(25, 1)], 1)
        after = [p for chunk in chunks for p in chunk.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        found.append(({name: p.detach().clone() for name, p in model.named_parameters()}, logits))
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
    return found


ALL = [pytest.param(base, tuple(LAYOUTS), marks=pytest.mark.parallel, id=base) for base in KINDS]


@pytest.mark.parametrize(("base", "layouts"), [pytest.param("memory", SHORT, id="short"), *ALL])
def test_every_layout_gathers_the_whole_model(base: str, layouts: tuple[str, ...]) -> None:
    config = KINDS[base]
    ((wanted, logits),) = run(1, wholes, [ONE.of(config)])[0]
    names = [name for name in layouts if fits(base, name)]
    for size, alike in groupby(names, key=lambda name: LAYOUTS[name].processes):
        tried = list(alike)
        for found in run(size, wholes, [LAYOUTS[name].of(config) for name in tried]):
            for name, (parameters, told) in zip(tried, found, strict=True):
                assert parameters.keys() == wanted.keys(), name
                assert all(torch.equal(p, wanted[key]) for key, p in parameters.items()), name
                assert torch.equal(told, logits), name
