"""The model that most tests build."""

from __future__ import annotations

from atlas_megatron.config import AttentionConfig, Config, MemoryConfig, ModelConfig

SMALL = Config(
    model=ModelConfig(pattern="M-*-M-", hidden_size=32, ffn_hidden_size=48, vocab_size=64, seq_length=32, init_std=0.1),
    memory=MemoryConfig(heads=4, head_dim=8, expansion=2, chunk=8, window=5, ns_period=4, gate_rank=6),
    attention=AttentionConfig(heads=4, head_dim=8, window=12),
)
