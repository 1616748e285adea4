"""What vLLM tells a model of one step: which texts, how far each has come, and in which block its state lies.

vLLM builds this once a step, as attention metadata of a backend of its own. The host knows all of it: nothing waits for
a device, and no CUDA graph captures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

NAME = "ATLAS"


@dataclass
class Step:
    """starts [B + 1]: where each text's tokens begin; read [B]: tokens of it before them; blocks [B] int64."""

    starts: list[int]
    read: list[int]
    blocks: Tensor


class StepBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """Makes a `Step` of what the runner knows."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        count = common_attn_metadata.num_reqs
        starts = common_attn_metadata.query_start_loc_cpu[: count + 1].tolist()
        # Exact: speculative decoding, which would make it a bound, is refused.
        lengths = common_attn_metadata.seq_lens_cpu_upper_bound[:count].tolist()
        read = [length - (stop - start) for length, start, stop in zip(lengths, starts, starts[1:], strict=False)]
        return Step(starts, read, common_attn_metadata.block_table_tensor[:count, 0].long())


class StepBackend(AttentionBackend):  # type: ignore[misc]
    """The backend that layers with this state name."""

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


def backend() -> Any:
    """vLLM's name for `StepBackend`; makes it known where it is not yet."""
    if NAME not in MambaAttentionBackendEnum.__members__:
        MambaAttentionBackendEnum.register(NAME, f"{__name__}.{StepBackend.__name__}")
    return MambaAttentionBackendEnum[NAME]
