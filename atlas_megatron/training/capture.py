"""Forward and backward of a step in one CUDA graph (train.cuda_graph), by Megatron-Core's wrapper of its schedule."""

from __future__ import annotations

from megatron.core.full_cuda_graph import FullCudaGraphWrapper
from megatron.core.pipeline_parallel import get_forward_backward_func

from atlas_megatron.parallel.device import device

WARMUP = 3  # eager steps before the capture: what is made at a first call is then there


def captured_schedule() -> FullCudaGraphWrapper:
    """Core's schedule: eager WARMUP times, then captured, then replayed on batches copied to the captured ones' place.

    Raises ValueError where there is no GPU.
    """
    if device().type != "cuda":
        raise ValueError("train.cuda_graph=true wants a GPU, and none is seen here; set train.cuda_graph=false")
    schedule = FullCudaGraphWrapper(get_forward_backward_func(), WARMUP, use_single_mempool=True)
    # The wrapper keeps its graph for the whole process: an earlier run's would be replayed.
    schedule.reset_cuda_graph()
    return schedule
