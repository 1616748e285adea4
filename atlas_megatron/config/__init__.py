"""A run's configuration: its sections, how it is read, changed and written, and what must hold between its keys."""

from atlas_megatron.config.chunks import at_chunk, continued
from atlas_megatron.config.differences import changed_toml, differences, model_differences
from atlas_megatron.config.layers import LAYERS, Layer, add_layer, uses
from atlas_megatron.config.sections import (
    LATER,
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DeltaConfig,
    ExpertsConfig,
    LogConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    RecurrentConfig,
    ResilienceConfig,
    RunConfig,
    TrainConfig,
    layers_of,
)
from atlas_megatron.config.toml import cut_evenly, describe, load, load_saved, to_toml

__all__ = [
    "LATER", "LAYERS", "AttentionConfig", "CheckpointConfig", "Config", "DataConfig", "DeltaConfig",
    "ExpertsConfig", "Layer", "LogConfig", "MemoryConfig", "ModelConfig", "ParallelConfig", "RecurrentConfig",
    "ResilienceConfig", "RunConfig", "TrainConfig", "add_layer", "at_chunk", "changed_toml", "continued", "cut_evenly",
    "describe", "differences", "layers_of", "load", "load_saved", "model_differences", "to_toml", "uses",
]  # fmt: skip
