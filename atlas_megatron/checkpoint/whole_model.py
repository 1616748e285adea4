"""The whole model on every process, from the shards of a live one in any layout; no file is written.

Bytes: every process receives all parameters once, and holds them beside its shard for as long as the copy lives.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model

from atlas_megatron.checkpoint.checkpoint import sharding_metadata
from atlas_megatron.config import Config, ParallelConfig
from atlas_megatron.model.build import build_model
from atlas_megatron.parallel import alone, world
from atlas_megatron.parallel.device import backend, device

# Of core's groups, those that a model asks for when it is built and read.
GROUPS = ("tp", "pp", "cp", "embd", "dp", "dp_cp", "tp_cp", "tp_dp_cp", "ep", "expt_tp", "expt_dp", "tp_ep", "mp")


def is_split(config: Config) -> bool:
    """Whether no process holds a model of this layout that it can read alone: a copy is made, without FP8."""
    parallel = config.parallel
    return max(parallel.tensor, parallel.pipeline, parallel.context, parallel.expert) > 1 or bool(config.train.fp8)


def unsplit(config: Config) -> Config:
    """The configuration of the same model in one process."""
    model = replace(config.model, pattern=config.model.pattern.replace("|", ""))
    train = replace(config.train, fp8="", cuda_graph=False)
    return replace(config, model=model, train=train, parallel=ParallelConfig())


class WholeModel:
    """Makes the model that a process reads alone; every process makes the same calls."""

    def __init__(self, config: Config) -> None:
        """config: the run's, in its layout."""
        self.config = unsplit(config)
        self._split = is_split(config)
        self._groups: ProcessGroupCollection | None = None

    def of(self, chunks: list[MegatronModule]) -> HybridModel:
        """The live model itself where this process holds all of it, else a copy with the weights as they are now.

        chunks: this process's stages, wrapped or not.
        """
        live = [unwrap_model(chunk) for chunk in chunks]
        if not self._split:
            return live[0]
        if self._groups is None:
            self._groups = _groups_of_one()
        whole = build_model(self.config, pg_collection=self._groups)
        _gather(live, whole)
        return whole.eval()


def _groups_of_one() -> ProcessGroupCollection:
    """Megatron's groups for a model that this process holds alone."""
    kind = backend() if torch.cuda.is_available() else alone.backend()
    own = torch.distributed.new_group([world.rank()], backend=kind, use_local_synchronization=True)
    groups = ProcessGroupCollection()
    for name in GROUPS:
        setattr(groups, name, own)
    return groups


@torch.no_grad()
def _gather(live: list[HybridModel], whole: HybridModel) -> None:
    """Every parameter from the process that holds it, or its part, to its place in `whole`."""
    own = [piece for model in live for piece in _pieces(model) if is_main_replica(piece.replica_id)]
    places: dict[str, list[ShardedTensor]] = {}
    for place in _pieces(whole):
        places.setdefault(place.key, []).append(place)
    missing = sum(place.data.numel() for found in places.values() for place in found)
    described = world.gathered([(p.key, p.global_offset, tuple(_in_whole(p).shape), p.data.dtype) for p in own])
    for owner, pieces in enumerate(described):
        for number, (key, offset, shape, dtype) in enumerate(pieces):
            mine = owner == torch.distributed.get_rank()
            own_part = _in_whole(own[number]).detach().contiguous() if mine else None
            part = torch.empty(shape, dtype=dtype, device=device()) if own_part is None else own_part
            torch.distributed.broadcast(part, src=owner)
            missing -= sum(_put(part, offset, place) for place in places[key])
    if missing:
        raise AssertionError(f"{missing} numbers of the model are on no process, or on two")


def _pieces(model: MegatronModule) -> list[ShardedTensor]:
    """What a checkpoint would hold of it, with the tensors themselves."""
    state = model.sharded_state_dict(metadata=sharding_metadata())
    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


def _put(part: torch.Tensor, offset: Iterable[int], place: ShardedTensor) -> int:
    """Copy a part of a parameter, which begins at `offset` in it, to where it meets this place; how many numbers."""
    given, taken, data = [], [], _in_whole(place)
    for at, size, start, length in zip(offset, part.shape, place.global_offset, data.shape, strict=True):
        first, last = max(at, start), min(at + size, start + length)
        if first >= last:
            return 0
        given.append(slice(first - at, last - at))
        taken.append(slice(first - start, last - start))
    data[tuple(taken)].copy_(part[tuple(given)])
    return math.prod(piece.stop - piece.start for piece in given)


def _in_whole(piece: ShardedTensor) -> torch.Tensor:
    """A view of its tensor with all axes of the whole: experts lie along one more, of which each is one place."""
    return piece.data[(None,) * piece.prepend_axis_num]
