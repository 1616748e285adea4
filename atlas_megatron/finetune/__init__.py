"""Fine-tuning an exported Hugging Face model on long texts, read in segments, with transformers' Trainer and DeepSpeed.

Imports nothing of training with Megatron; `.bin/.idx` data are read by Megatron-Core.
"""
