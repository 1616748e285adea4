"""Which ptxas makes machine code of what Triton compiles.

Triton 3.6 brings two: that of CUDA 12.8, which it takes below compute capability 10.0, and that of CUDA 12.9 for the
rest. A `wgmma` on 9.0 takes an operand from shared memory by a descriptor in two registers. The ptxas of 12.8 copies a
descriptor, in some kernels, after it has computed others from the copy. The product then takes what lies elsewhere:
wrong numbers, or an illegal memory access. Of the scan and the chain this struck the read, the write of a short chunk
and the chain's backward. The ptxas of 12.9 has the order right in all; benchmarks/wgmma_operands.py watches over it.
"""

from __future__ import annotations

import os

import triton
from triton.backends.nvidia.compiler import get_ptxas_version

# The first CUDA whose ptxas does so.
SOUND = (12, 9)


def take_sound_ptxas() -> None:
    """Have Triton take the newer ptxas below 10.0 too, in this process and those that it starts.

    Where TRITON_PTXAS_PATH names one, or Triton's own is as new, nothing changes.
    """
    if os.environ.get("TRITON_PTXAS_PATH"):
        return
    nvidia = triton.knobs.nvidia
    newer = nvidia.ptxas_blackwell
    if _release(nvidia.ptxas.version) < SOUND <= _release(newer.version):
        nvidia.ptxas = newer.path
        # The version is part of a kernel's name in the cache, and may have been looked up before.
        get_ptxas_version.cache_clear()


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
