"""The plug-in that vLLM finds by its entry point `vllm.general_plugins`: it makes exported models known there.

vLLM calls `register` in each of its processes. The package has to be installed in vLLM's environment (docs/serving.md).
"""

from __future__ import annotations

ARCHITECTURE = "AtlasForCausalLM"


def register() -> None:
    """Make transformers and vLLM know the model; may be called again."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import config
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    import atlas_megatron.hf.auto  # noqa: F401  registers the configuration
    from atlas_megatron.hf.configuration_atlas import AtlasConfig
    from atlas_megatron.serving.vllm_batch import backend
    from atlas_megatron.serving.vllm_config import AtlasLengths, AtlasServingConfig

    backend()

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "atlas_megatron.serving.vllm_model:AtlasForVLLM")
    config.MODELS_CONFIG_MAP[ARCHITECTURE] = AtlasServingConfig
    MODEL_ARCH_CONFIG_CONVERTORS[AtlasConfig.model_type] = AtlasLengths
