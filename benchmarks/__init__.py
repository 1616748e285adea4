"""How long the memory, its kernels and its presets take, and what their machine code needs."""
