"""From a Config to a Megatron-Core model."""
