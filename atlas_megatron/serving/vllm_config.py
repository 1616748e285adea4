"""What vLLM is told of an exported model before it is built, and what is refused there by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.model_executor.models.config import MambaModelConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from atlas_megatron.serving import memory_files
from atlas_megatron.serving.rows import check_servable

# Key of --additional-config: the folder with memory files that requests may name.
MEMORIES = "memories"
REQUESTS = "atlas_megatron.serving.vllm_memories:MemoryRequests"


class AtlasServingConfig(MambaModelConfig):  # type: ignore[misc]
    """State of constant size, one block a text, no prefix caching."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Raises ValueError for what the model cannot do; called once, in the process that takes requests."""
        check_servable(vllm_config.model_config.hf_config)
        _refuse(vllm_config)
        super().verify_and_update_config(vllm_config)
        folder = vllm_config.additional_config.get(MEMORIES)
        if folder is not None:
            memory_files.offer(Path(folder), Path(vllm_config.model_config.model), vllm_config.model_config.hf_config)
        processors = vllm_config.model_config.logits_processors or []
        vllm_config.model_config.logits_processors = [*processors, REQUESTS]


def _refuse(vllm_config: Any) -> None:
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, name) != 1:
            raise ValueError(f"{name}={getattr(parallel, name)}, and the plug-in keeps a model on one device; give 1")
    if cache.enable_prefix_caching:
        raise ValueError(
            "prefix caching keeps states at the ends of blocks, and a memory is kept where a text stands; leave it out "
            "(--no-enable-prefix-caching), and name a memory file in the request instead"
        )
    if vllm_config.speculative_config is not None:
        raise ValueError("speculative decoding takes tokens back, and a memory cannot; leave it out")
    if vllm_config.use_v2_model_runner:
        raise ValueError(
            "vLLM's second model runner was chosen, and the plug-in was run with the first alone; set "
            "VLLM_USE_V2_MODEL_RUNNER=0"
        )


class AtlasLengths(ModelArchConfigConvertorBase):  # type: ignore[misc]
    """How long a request may be: the length of training bounds nothing but full attention."""

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        return self.hf_text_config.max_position_embeddings, "max_position_embeddings"
