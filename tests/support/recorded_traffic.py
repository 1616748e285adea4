"""One training step of small models in real processes, with everything that is sent counted: run by test_dry_run.py."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from atlas_megatron.config import Config
from atlas_megatron.config.checks import data_parallel_size, validate
from atlas_megatron.estimate.memory import micro_batches
from atlas_megatron.estimate.traffic import Kind, RankPlace
from atlas_megatron.parallel import world
from atlas_megatron.parallel.context import settle
from atlas_megatron.training import muon, trainer

OTHER = "other"
# (how the group is called, the call) -> what is sent; messages of the context group differ by their dimensions.
KINDS: dict[tuple[str, str], Kind] = {
    ("tensor", "all_reduce"): Kind.TENSOR_SUM,
    ("tensor", "all_gather_into_tensor"): Kind.TENSOR_GATHER,
    ("tensor", "all_gather"): Kind.TENSOR_GATHER,
    ("tensor", "reduce_scatter_tensor"): Kind.TENSOR_SCATTER,
    ("pipeline", "isend"): Kind.PIPELINE,
    # Of two pipeline ranks, core sends one way through the group of everyone.
    ("everyone", "isend"): Kind.PIPELINE,
    ("near", "all_to_all_single"): Kind.HEADS,
    ("near", "all_gather"): Kind.HEADS,
    ("far", "isend"): Kind.STATE,
    ("experts", "all_to_all_single"): Kind.EXPERTS,
    ("replicas", "reduce_scatter_tensor"): Kind.EXPERT_GRADIENTS,
    ("replicas", "all_gather_into_tensor"): Kind.EXPERT_PARAMETERS,
    ("data", "reduce_scatter_tensor"): Kind.GRADIENTS,
    ("data", "all_gather_into_tensor"): Kind.PARAMETERS,
    ("data", "all_reduce"): Kind.GRADIENT_SUM,
    ("embedding", "all_reduce"): Kind.EMBEDDING,
}
MESSAGES = {5: Kind.ATTENTION, 3: Kind.CONVOLUTION, 1: Kind.STATE}
# Of each call: the argument that goes round, and how often a rank sends the whole of it (n ranks).
SENT: dict[str, tuple[str, Callable[[int], float]]] = {
    "all_reduce": ("tensor", lambda n: 2 * (n - 1) / n),
    "all_gather_into_tensor": ("output_tensor", lambda n: (n - 1) / n),
    "all_gather": ("tensor", lambda n: n - 1),
    "reduce_scatter_tensor": ("input", lambda n: (n - 1) / n),
    "all_to_all_single": ("input", lambda n: (n - 1) / n),
    "isend": ("tensor", lambda n: 1),
    "send": ("tensor", lambda n: 1),
    "broadcast": ("tensor", lambda n: (n - 1) / n),
    "reduce": ("tensor", lambda n: (n - 1) / n),
}


@dataclass(frozen=True)
class Counted:
    """Of one rank."""

    place: RankPlace
    parameters: int
    sent: dict[str, float]  # bytes, by Kind or OTHER
    muons: int  # parameters that Muon moves
    states: int  # bytes of the optimizer's states and master weights


def steps(rank: int, cases: list[Config]) -> list[Counted]:
    """What this rank has sent in one step of each case."""
    return [_step(config) for config in cases]


def _step(config: Config) -> Counted:
    size = dist.get_world_size()
    validate(config, size)
    parallel_state.destroy_model_parallel()
    world.form_groups(config)
    world.seed(7)
    trained = trainer._build(config)
    batches = [_batch(config) for _ in range(micro_batches(config, size))]
    for chunk in trained.chunks:
        chunk.zero_grad_buffer()
    with _counting() as sent:
        get_forward_backward_func()(
            forward_step_func=partial(trainer._forward_step, config.data.packed),
            data_iterator=[iter(batches) for _ in trained.chunks],
            model=trained.chunks,
            num_microbatches=len(batches),
            seq_length=config.model.seq_length,
            micro_batch_size=config.train.micro_batch,
            forward_only=False,
        )
        settle()
        trained.scheduler.step(1)
        trained.optimizer.step()
    assert parallel_state.get_data_parallel_world_size() == data_parallel_size(config, size)
    return Counted(
        RankPlace(parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_context_parallel_rank()),
        sum(p.numel() for chunk in trained.chunks for p in chunk.parameters()),
        {kind: sent[kind] for kind in sent if sent[kind]},
        sum(p.numel() for chunk in trained.chunks for p in chunk.parameters() if getattr(p, muon.MARK, False)),
        sum(_states(trained.optimizer, masters=config.train.precision == "bfloat16")),
    )


def _states(optimizer: Any, *, masters: bool) -> Iterator[int]:
    """Bytes of each tensor that an optimizer, or a chain of them, keeps besides parameters and gradients."""
    for part in getattr(optimizer, "chained_optimizers", []):
        yield from _states(part, masters=masters)
    if not hasattr(optimizer, "chained_optimizers"):
        for state in optimizer.optimizer.state.values():
            yield from (value.nbytes for value in state.values() if torch.is_tensor(value) and value.dim())
        if masters:
            yield from (p.nbytes for group in optimizer.optimizer.param_groups for p in group["params"])


def _batch(config: Config) -> dict[str, torch.Tensor]:
    """This rank's shard of random sequences; documents of 9 tokens."""
    size, length = config.train.micro_batch, config.model.seq_length
    drawn = torch.randint(config.model.vocab_size, (size, length + 1), generator=torch.Generator().manual_seed(5))
    whole = {
        "tokens": drawn[:, :-1],
        "labels": drawn[:, 1:],
        "position_ids": (torch.arange(length) % 9).expand(size, -1),
        "loss_mask": torch.ones(size, length),
    }
    shard = parallel_state.get_context_parallel_rank()
    own = {name: tensor.chunk(config.parallel.context, 1)[shard] for name, tensor in whole.items()}
    return own | {"counted": whole["loss_mask"].sum()}


@contextmanager
def _counting() -> Iterator[Counter[str]]:
    """Every module's torch.distributed calls, also those bound by their names, count what they send."""
    sent: Counter[str] = Counter()
    names = _groups()
    counted = {id(getattr(dist, call)): _counted(call, getattr(dist, call), names, sent) for call in SENT}
    replaced = []
    # One pass over all modules, for it takes most of a case's time.
    for module in list(sys.modules.values()):
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in counted:
                replaced.append((module, attribute, value))
                setattr(module, attribute, counted[id(value)])
    try:
        yield sent
    finally:
        for module, attribute, original in replaced:
            setattr(module, attribute, original)


def _counted(call: str, original: Callable[..., Any], names: dict[str, str], sent: Counter[str]) -> Callable[..., Any]:
    argument, times = SENT[call]
    signature = inspect.signature(original)
    under_way = False

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        # Where a torch function mode is on, torch has a collective call itself again.
        nonlocal under_way
        if under_way:
            return original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        tensor, group = given[argument], given.get("group") or dist.group.WORLD
        name = names.get(group.group_name, OTHER)
        kind = MESSAGES[tensor.dim()] if (name, call) == ("context", "isend") else KINDS.get((name, call), OTHER)
        sent[kind] += times(group.size()) * tensor.nbytes
        under_way = True
        try:
            return original(*args, **kwargs)
        finally:
            under_way = False

    return wrapper


def _groups() -> dict[str, str]:
    """What each of Megatron's groups is for, by its name in torch."""
    assert dist.group.WORLD is not None
    found = {dist.group.WORLD.group_name: "everyone"}
    own = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "embedding": parallel_state.get_embedding_group(check_initialized=False),
        "context": parallel_state.get_context_parallel_group(),
    }
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        own["experts"] = parallel_state.get_expert_model_parallel_group()
    own["replicas"] = parallel_state.get_expert_data_parallel_group()
    if parallel_state.get_context_parallel_world_size() > 1:
        own["near"], own["far"] = parallel_state.get_hierarchical_context_parallel_groups()
    for name, group in own.items():
        if isinstance(group, dist.ProcessGroup):
            assert found.setdefault(group.group_name, name) == name
    return found
