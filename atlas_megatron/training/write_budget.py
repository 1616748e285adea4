"""The budget of the write gates: what asks memories, in training, to leave alone what is not worth a write."""

from __future__ import annotations

from megatron.core.transformer import MegatronModule

from atlas_megatron.config import LAYERS, Config, layers_of
from atlas_megatron.mixers.memory import AtlasMixer

RISE = 0.25  # share of the steps over which the budget rises: what nothing reads yet should not be forbidden at once
LATE = 0.5, 0.9  # shares of the steps between which it rises once more


def budget_at(config: Config, step: int) -> float:
    """What the mean of sqrt(w + FLOOR) counts beside the loss in step `step` (from 1)."""
    train = config.train
    done = step / train.steps
    budget = train.write_budget * min(1.0, done / RISE)
    if train.late_write_budget:
        start, end = LATE
        budget += (train.late_write_budget - train.write_budget) * min(1.0, max(0.0, (done - start) / (end - start)))
    return budget


def weight_of_token(config: Config, step: int, tokens: int) -> float:
    """What sqrt(w + FLOOR) of one gate of one token counts in step `step` (from 1), so that the sum over the step's
    `tokens` of a replica is the budget x the mean over gates, layers and tokens.

    Core averages gradients over replicas and over the shards of a sequence, which are parts of one mean.
    """
    layers = sum("memory" in LAYERS[symbol].sections for symbol in layers_of(config))
    return budget_at(config, step) * config.parallel.context / (tokens * config.memory.heads * layers)


def set_budget(chunks: list[MegatronModule], config: Config, step: int, tokens: int) -> None:
    """Tell the memories of these stages what a written token counts in this step; arguments as above."""
    if not config.train.write_budget:
        return
    weight = weight_of_token(config, step, tokens)
    for memory in (m for chunk in chunks for m in chunk.modules() if isinstance(m, AtlasMixer)):
        memory.write_budget = weight
