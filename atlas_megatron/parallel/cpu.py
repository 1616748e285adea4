"""Megatron-Core without a GPU: what core hard-codes to CUDA, redirected to CPU tensors and gloo.

Without a GPU every parallel layout runs as ordinary processes, by the same code path. On a machine with one,
`install` does nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from atlas_megatron.parallel.device import CPU, flush_denormals, keep_freed_memory

logger = logging.getLogger(__name__)

_installed: TorchFunctionMode | None = None


def install() -> bool:
    """Redirect core to the CPU if there is no GPU; says whether it did. Calling it again changes nothing."""
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed is None:
        flush_denormals()
        keep_freed_memory()
        # Core compiles functions when it is imported, and torch's compiler wants to find torch.cuda untouched.
        from megatron.core.tensor_parallel import random as core_random
        from megatron.core.transformer.moe import token_dispatcher

        _replace_devices_and_streams()
        _replace_random_state(core_random)
        # Of tensors on a GPU alone core makes the plain numbers that an all-to-all of uneven parts wants.
        token_dispatcher.maybe_move_tensor_to_cpu = _as_numbers
        _installed = _CudaMeansCpu()
        _installed.__enter__()  # never left: it holds for the life of the process
        logger.info("no GPU found: Megatron-Core runs on CPU tensors")
    return True


class _CudaMeansCpu(TorchFunctionMode):
    """Every call that names a CUDA device gets the CPU instead.

    Seen by torch as long as the mode is entered, in the thread that entered it: factory functions with
    device="cuda", Tensor.cuda(), Tensor.to("cuda"), and Module.cuda(), which calls Tensor.cuda().
    """

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The mixed-precision optimizer recognises its parameters by the names of CUDA tensor types.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _names_cuda(given: object) -> bool:
    return (isinstance(given, str) and given.startswith("cuda")) or (
        isinstance(given, torch.device) and given.type == "cuda"
    )


class _NoStream:
    """A CUDA stream or event where work is done by the time a call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, event: _NoStream | None = None) -> _NoStream:
        return event or _NoStream()

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


def _nothing() -> Callable[..., None]:
    # One function a name: torch's compiler keeps a rule for each and refuses an object found under two.
    return lambda *args, **kwargs: None


def _as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _replace_devices_and_streams() -> None:
    no_stream = _NoStream()
    replaced: dict[str, Any] = {
        "current_device": lambda: CPU,
        "current_stream": lambda device=None: no_stream,
        "default_stream": lambda device=None: no_stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": _nothing(),
        "set_device": _nothing(),
        "Stream": _NoStream,
        "Event": _NoStream,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push = _nothing()
    torch.cuda.nvtx.range_pop = _nothing()


def _replace_random_state(core_random: ModuleType) -> None:
    """Core's named random states ("model-parallel-rng", ...) become states of the CPU generator."""

    def get_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    replaced = {"get_rng_state": get_state, "set_rng_state": set_state, "manual_seed": manual_seed}
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
        setattr(torch.cuda.random, name, value)
    torch.cuda.default_generators = (torch.default_generator,)
    for name, value in {"_get_cuda_rng_state": get_state, "_set_cuda_rng_state": set_state}.items():
        setattr(core_random, name, value)
