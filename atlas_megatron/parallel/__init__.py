"""Process groups, context parallelism, and Megatron-Core without a GPU."""
