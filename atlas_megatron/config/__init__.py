"""A run's configuration: its sections, how it is read, changed and written, and what must hold between its keys."""

from atlas_megatron.config.differences import changed_toml, differences, model_differences
from atlas_megatron.config.sections import (
    LATER,
    LAYERS,
    WITH_ATTENTION,
    WITH_DELTA,
    WITH_MEMORY,
    WITH_RECURRENT,
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DeltaConfig,
    LogConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    RecurrentConfig,
    ResilienceConfig,
    RunConfig,
    TrainConfig,
    has,
    layers_of,
)
from atlas_megatron.config.toml import cut_evenly, describe, load, load_saved, to_toml

__all__ = [
    "LATER", "LAYERS", "WITH_ATTENTION", "WITH_DELTA", "WITH_MEMORY", "WITH_RECURRENT",
    "AttentionConfig", "CheckpointConfig", "Config", "DataConfig", "DeltaConfig", "LogConfig", "MemoryConfig",
    "ModelConfig", "ParallelConfig", "RecurrentConfig", "ResilienceConfig", "RunConfig", "TrainConfig",
    "changed_toml", "cut_evenly", "describe", "differences", "has", "layers_of", "load", "load_saved",
    "model_differences", "to_toml",
]  # fmt: skip
