"""Triton kernels behind `impl="triton"`; nothing here is imported unless it is asked for."""
