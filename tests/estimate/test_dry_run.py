"""The dry run's closed forms against built models and real steps: parameters exactly, bytes sent kind by kind."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from itertools import batched
from typing import Any

import pytest

from atlas_megatron.config import (
    AttentionConfig,
    Config,
    DeltaConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    RecurrentConfig,
    TrainConfig,
)
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.estimate.memory import footprint, parameters_at, stages_at
from atlas_megatron.estimate.optimizer import moved_by_muon
from atlas_megatron.estimate.traffic import Kind, bytes_sent
from tests.support import processes
from tests.support import recorded_traffic as traffic

# What the closed forms leave out: the padding of buffers, and scalars.
LEFT_OUT = 0.05
SMALL = Config(
    model=ModelConfig(hidden_size=64, ffn_hidden_size=96, vocab_size=128, seq_length=48),
    memory=MemoryConfig(heads=4, head_dim=16, expansion=2, chunk=8, window=5, ns_period=8, gate_rank=6),
    attention=AttentionConfig(heads=4, head_dim=16, window=30, segment=12),
    recurrent=RecurrentConfig(heads=4, head_dim=16),
    delta=DeltaConfig(heads=4, head_dim=16),
    train=TrainConfig(global_batch=4, micro_batch=2, warmup_steps=1),
)


def case(pattern: str = "M-*-", **sections: dict[str, Any]) -> Config:
    """SMALL with these layers and keys, by section."""
    changed = {name: replace(getattr(SMALL, name), **keys) for name, keys in sections.items() if name != "parallel"}
    config = replace(SMALL, parallel=ParallelConfig(**sections.get("parallel", {})), **changed)
    return replace(config, model=replace(config.model, pattern=pattern))


def context(ranks: int, mode: str, **keys: Any) -> dict[str, Any]:
    return {"context": ranks, "context_mode": mode, **keys}


INTERLEAVED = {"pipeline": 2, "virtual": 2}
HALF = {"precision": "bfloat16"}
MUON = {"optimizer": "muon"}
EVERY = "M-*-A-C-F-R-L-D-G-"
MUONS = {
    "Muon, data": (2, case(EVERY, train=MUON)),
    "Muon, tensor": (2, case(EVERY, train=MUON, parallel={"tensor": 2})),
    "Muon, whole linears": (2, case("M-*-", train=MUON | {"muon_split_qkv": False}, parallel={"tensor": 2})),
    "Muon, products summed": (
        2, case("M-*-", train=MUON | {"muon_tp_mode": "distributed"}, parallel={"tensor": 2, "sequence": True}),
    ),
    "Muon, every rank its own": (2, case(train=MUON | {"muon_tp_mode": "blockwise"}, parallel={"tensor": 2})),
    "Muon, memories": (2, case("M-A-", train=MUON | {"muon_memories": True}, parallel={"tensor": 2})),
    "Muon, by layer": (2, case("M-*-" * 4, train=MUON | HALF | {"muon_layer_wise": True})),
}  # fmt: skip
NODES = {"devices_per_node": 2}
ROUTED = {"count": 4, "ffn_hidden_size": 48, "shared_ffn_hidden_size": 32}
EXPERTS = {
    "experts, data": (2, case("ME-E", experts=ROUTED)),
    "experts, shared out": (2, case("ME-E", experts=ROUTED, parallel={"expert": 2})),
    "experts, sequence": (2, case("ME*E", experts=ROUTED, parallel={"tensor": 2, "sequence": True})),
    "experts, sequence, shared out": (
        2, case("ME", experts=ROUTED, parallel={"tensor": 2, "sequence": True, "expert": 2}),
    ),
    "experts alone, recomputed": (
        2, case("ME", experts={"count": 4, "top_k": 1}, parallel={"expert": 2}, train={"recompute_modules": ("moe",)}),
    ),
    "experts, pipeline, context": (
        4, case("ME|*E", experts=ROUTED, parallel=context(2, "handoff", pipeline=2, expert=2), train=HALF),
    ),
}  # fmt: skip
LOCALS = {"locals": ("4/24", "2/8", "4/24"), "projection": True, "read": "chunk"}
# By name: processes, and what is trained on them.
CASES: dict[str, tuple[int, Config]] = {
    "data": (2, case()),
    "tensor": (2, case(parallel={"tensor": 2})),
    "tensor, every layer": (2, case("A-C-D-G-R-L-F-", parallel={"tensor": 2})),
    "tensor, recomputed": (2, case(parallel={"tensor": 2}, train={"recompute": True})),
    "tensor, first layers recomputed": (
        4, case("M-*-|*-", parallel={"tensor": 2, "pipeline": 2}, train={"recompute": True, "recompute_layers": 3}),
    ),
    "tensor, MLPs recomputed": (
        2, case(parallel={"tensor": 2}, train={"recompute_modules": ("mlp",)}),
    ),
    "sequence, first layers recomputed": (
        2, case(parallel={"tensor": 2, "sequence": True}, train={"recompute": True, "recompute_layers": 3}),
    ),
    "sequence, MLPs recomputed": (
        2, case(parallel={"tensor": 2, "sequence": True}, train={"recompute_modules": ("mlp",)}),
    ),
    "sequence": (2, case("M-*-A-D-", parallel={"tensor": 2, "sequence": True})),
    "pipeline": (2, case("M-*|-", parallel={"pipeline": 2})),
    "pipeline, untied": (2, case("M-*|-", model={"tied_embeddings": False}, parallel={"pipeline": 2})),
    "interleaved": (2, case("M|-|*|-", parallel=INTERLEAVED)),
    "heads": (2, case("M-*-A-D-G-F-", parallel=context(2, "heads"))),
    "heads, packed": (2, case("M-*-", data={"packed": True}, parallel=context(2, "heads"))),
    "handed on": (2, case("M-*-A-D-G-F-", parallel=context(2, "handoff"))),
    "handed on, packed": (2, case("M-*-D-R-", data={"packed": True}, parallel=context(2, "handoff"))),
    "heads of a growing cache": (2, case("M-", memory=PRESETS["dot"], parallel=context(2, "heads"))),
    "shards, heads": (2, case("M-", memory={"shard": 24}, parallel=context(2, "heads"))),
    "shards, handed on": (2, case("A-", memory={"shard": 8, "locals": ("2/12",)}, parallel=context(2, "handoff"))),
    "locals, heads": (2, case("M-", memory=LOCALS, parallel=context(2, "heads"))),
    "locals, handed on": (2, case("M-A-", memory=LOCALS, parallel=context(2, "handoff"))),
    "locals, tensor": (2, case("M-", memory=LOCALS, parallel={"tensor": 2})),
    "handed on, other layers": (2, case("R-L-C-", parallel=context(2, "handoff"))),
    "handed on, recomputed": (2, case(train={"recompute": True}, parallel=context(2, "handoff"))),
    "handed on, first layers recomputed": (
        2, case(train={"recompute": True, "recompute_layers": 2}, parallel=context(2, "handoff")),
    ),
    "inside a chunk": (2, case("M-", model={"seq_length": 40}, parallel=context(2, "handoff"))),
    "source gates, no momentum": (
        2,
        case("M-", memory={"momentum": False, "ns_steps": 0, "ns_period": 1, "omega_gates": "source"},
             parallel=context(2, "handoff")),
    ),  # fmt: skip
    "bfloat16, tensor": (2, case("M-*-D-", parallel={"tensor": 2}, train=HALF)),
    "bfloat16, sequence": (2, case(parallel={"tensor": 2, "sequence": True}, train=HALF)),
    "bfloat16, pipeline": (2, case("M-*|-", parallel={"pipeline": 2}, train=HALF)),
    "bfloat16, heads": (2, case("M-*-A-G-", parallel=context(2, "heads"), train=HALF)),
    "bfloat16, handed on": (2, case("M-A-D-R-C-", parallel=context(2, "handoff"), train=HALF)),
    "heads and handed on": (4, case("M-*-", parallel=context(4, "heads+handoff", **NODES))),
    "handed on to three": (4, case("M-*-F-", parallel=context(4, "handoff"))),
    "tensor, pipeline, context": (8, case("M-|*-", parallel={"tensor": 2, "pipeline": 2, **context(2, "heads")})),
} | EXPERTS | (MUONS if find_spec("emerging_optimizers") else {})


@pytest.fixture(scope="module")
def found() -> dict[str, list[traffic.Counted]]:
    """Of each case, what each rank has counted."""
    counted = {}
    for size in {size for size, _ in CASES.values()}:
        # Some at a time: processes that say nothing for too long are taken for hung.
        for names in batched((name for name, (ranks, _) in CASES.items() if ranks == size), 10):
            ranks = processes.run(size, traffic.steps, [CASES[name][1] for name in names])
            counted |= {name: [rank[number] for rank in ranks] for number, name in enumerate(names)}
    return counted


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_built_models(name: str, found: dict[str, list[traffic.Counted]]) -> None:
    for rank in found[name]:
        assert parameters_at(CASES[name][1], rank.place.pipeline) == rank.parameters


@pytest.mark.parametrize("name", CASES)
def test_states_are_those_of_built_optimizers(name: str, found: dict[str, list[traffic.Counted]]) -> None:
    size, config = CASES[name]
    for rank in found[name]:
        layers = "".join(stages_at(config, rank.place.pipeline))
        assert moved_by_muon(config, layers) // config.parallel.tensor == rank.muons
        told = footprint(config, size, rank.place.pipeline, bf16=config.train.precision == "bfloat16").optimizer
        # Sharded states follow the buffers, whose padding they have; a layer-wise Muon's, whole matrices.
        assert told == pytest.approx(rank.states, rel=2 * LEFT_OUT)


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_sent(name: str, found: dict[str, list[traffic.Counted]]) -> None:
    size, config = CASES[name]
    for rank in found[name]:
        told = bytes_sent(config, size, rank.place, bf16=config.train.precision == "bfloat16")
        counted = dict(rank.sent)
        assert counted.pop(traffic.OTHER, 0.0) <= LEFT_OUT * sum(counted.values())
        assert told.keys() == counted.keys()
        for kind in told:
            # Only the buffers of data parallelism are padded.
            padded = kind in (Kind.GRADIENTS, Kind.PARAMETERS, Kind.EXPERT_GRADIENTS, Kind.EXPERT_PARAMETERS)
            if kind is Kind.EXPERTS:
                # Which rank gets how much back is the router's choice.
                alike = [other.sent[kind] for other in found[name] if other.place.pipeline == rank.place.pipeline]
                counted[kind] = sum(alike) / len(alike)
            assert told[kind] == pytest.approx(counted[kind], rel=LEFT_OUT if padded else 1e-9), (kind, rank.place)
