"""Whether a machine could ever hold a configuration, before memory is asked for.

What does not fit by far is refused with sizes; whether the rest fits, the training itself finds out.
"""

from __future__ import annotations

import os

import psutil
import torch

from atlas_megatron.config import Config
from atlas_megatron.estimate.memory import footprint, fullest, parameters_at
from atlas_megatron.model.build import parameter_dtype

# Activations are an estimate: only so many times the machine's memory is more than can be.
ESTIMATE = 8
INDEX_BYTES = 24  # of a validation sequence: a document, an offset, a place in the order


def check_training(config: Config, world_size: int) -> None:
    """Raise ValueError where weights, gradients and moments alone are more than the machine has."""
    bf16 = parameter_dtype(config).itemsize == 2
    rank = fullest(config, world_size, bf16=bf16)
    held, most = footprint(config, world_size, rank, bf16=bf16), memory_of_a_process()
    kept = held.parameters + held.gradients + held.optimizer
    if kept > most or held.total > ESTIMATE * most:
        what = "weights, gradients and moments" if kept > most else "one step, activations included,"
        raise ValueError(
            f"{what} would take about {said(kept if kept > most else held.total)} on a device "
            f"({parameters_at(config, rank):,} parameters), which has {said(most)}; make the model or its batches "
            "smaller, or take more devices: --dry-run says what each would take"
        )
    index = INDEX_BYTES * config.train.validate_sequences if config.train.validate_every else 0
    if index > most:
        raise ValueError(
            f"train.validate_sequences={config.train.validate_sequences} would take {said(index)} to list, and there "
            f"are {said(most)}; give fewer"
        )


def check_reading(config: Config) -> None:
    """Raise ValueError where the weights alone, in a single process, are more than the machine has."""
    count, most = parameters_at(config, 0), memory_of_a_process()
    size = count * parameter_dtype(config).itemsize
    if size > most:
        raise ValueError(
            f"the model's {count:,} parameters would take {said(size)}, and this machine has {said(most)}; read it on "
            "a larger one"
        )


def memory_of_a_process() -> int:
    """Bytes: of its GPU, else its share of the machine's memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return psutil.virtual_memory().total // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def said(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
