"""Fixtures that several rooms share."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

# Where there is no GPU, Triton's interpreter runs the kernels. It has to be asked for before Triton is imported, which
# Megatron-Core does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        from tests.support import interpreter

        interpreter.quicken()
else:
    # What torch asks for before it multiplies matrices under torch.use_deterministic_algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# A shell has Ctrl-C ignored by what it starts in the background, and so by the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where several processes share the tests (pytest-xdist), each takes its share of the cores, and so do those it starts.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(share)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

# Code of exported folders is copied to where only this process reads: transformers imports it by the folder's name, and
# reads where to copy it when it is imported itself.
modules = tempfile.mkdtemp(prefix="modules-")
atexit.register(shutil.rmtree, modules, ignore_errors=True)
os.environ["HF_MODULES_CACHE"] = modules


@pytest.fixture
def single_process_megatron(tmp_path: Path) -> Iterator[None]:
    """Megatron-Core in a world of one, seeded; on the CPU where there is no GPU."""
    from atlas_megatron.parallel import cpu
    from atlas_megatron.parallel.device import backend

    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group(
        backend(), init_method=f"file://{tmp_path}/rendezvous", world_size=1, rank=0
    )
    parallel_state.initialize_model_parallel()
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
