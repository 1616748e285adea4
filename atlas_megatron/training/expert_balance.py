"""How evenly the experts of a model are used."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from atlas_megatron.config import Config
from atlas_megatron.config.checks import data_parallel_size
from atlas_megatron.config.layers import EXPERTS
from atlas_megatron.parallel.device import device


def expert_balance(config: Config, micro_batches: int) -> dict[str, float]:
    """What a step's record says of its so many micro-batches, which core has noted; every process calls it.

    expert_balance: the load-balancing loss before its weight, in the mean over E layers and micro-batches: 1 where all
    experts are used alike, experts.count / top_k where all tokens take the same ones. Empty without E layers, and with
    train.aux_loss = 0, where core computes none.
    """
    if EXPERTS not in config.model.pattern or not config.train.aux_loss:
        return {}
    tracker = get_moe_metrics_tracker()
    noted = sum((entry.values.sum().double() for entry in tracker.metrics.values()), torch.zeros((), device=device()))
    # Each rank has its tokens' part of a loss that is the whole sequence's; each stage, its layers'.
    torch.distributed.all_reduce(noted)
    tracker.clear()
    whole = data_parallel_size(config, torch.distributed.get_world_size()) * micro_batches
    return {"expert_balance": noted.item() / whole / config.model.pattern.count(EXPERTS)}
