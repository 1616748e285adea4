"""The learning rate of every step: core's scheduler, which counts steps, as `train.schedule` asks for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from atlas_megatron.config import TrainConfig

# Core's names of `train.schedule` and of `train.decay_shape`.
STYLES = {"cosine": "cosine", "wsd": "WSD", "constant": "constant", "inverse_sqrt": "inverse-square-root"}
SHAPES = {"linear": "linear", "1-sqrt": "minus_sqrt"}


def build_schedule(train: TrainConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Core's scheduler of a Megatron optimizer; it begins before the first step."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=train.warmup_steps,
        lr_decay_steps=train.steps,
        lr_decay_style=STYLES[train.schedule],
        wsd_decay_steps=train.decay_steps,
        lr_wsd_decay_style=SHAPES[train.decay_shape],
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=train.steps,
        wd_incr_style="constant",
        # The schedule is the configuration's, not the checkpoint's: a resumed run may be made longer.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def learning_rate(train: TrainConfig, step: int) -> float:
    """Of the update that step `step` makes (from 1)."""
    schedule = build_schedule(train, SimpleNamespace(param_groups=[]))
    schedule.num_steps = step
    return float(schedule.get_lr({}))
