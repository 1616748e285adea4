"""A request that names a memory file, as vLLM sees it: checked before it is taken, ended where its file went bad since.

A request names the file in `vllm_xargs={"memory": NAME}`, from Python in `SamplingParams(extra_args=...)`. vLLM tells a
logits processor, and no model, which request stands in which row of a batch: so this is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import LogitsProcessor

from atlas_megatron.serving import memory_files


@dataclass
class Named:
    """A memory that a conversation goes on from. lost: its file could not be read after all."""

    name: str
    lost: bool = False


# Of this process's batch, by row. Rows that name none are not in it.
in_batch: dict[int, Named] = {}


class MemoryRequests(LogitsProcessor):  # type: ignore[misc]
    """Refuses requests with a wrong file, and knows the rows of the others.

    It changes no logits, but for conversations that are lost: these end with the next token.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        end = vllm_config.model_config.hf_config.eos_token_id
        self._end = 0 if end is None else end

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError, which vLLM answers with status 400."""
        name = _name(sampling_params)
        if name is not None:
            memory_files.offered().check(name)

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(in_batch, batch_update, _named)

    def is_argmax_invariant(self) -> bool:
        return False

    def apply(self, logits: Tensor) -> Tensor:
        rows = [row for row, named in in_batch.items() if named.lost]
        if rows:
            logits[rows] = -torch.inf
            logits[rows, self._end] = 0.0
        return logits


def _name(sampling_params: Any) -> Any:
    """The memory that a request names; None: it begins with nothing."""
    return (sampling_params.extra_args or {}).get(memory_files.KEY)


def _named(sampling_params: Any, _prompt: Any, _output: Any) -> Named | None:
    name = _name(sampling_params)
    return None if name is None else Named(name)
