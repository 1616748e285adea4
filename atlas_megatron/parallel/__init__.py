"""Where Megatron-Core meets the devices."""
