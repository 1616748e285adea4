"""Sequence mixers that fit the layer slots of Megatron-Core's HybridModel."""
