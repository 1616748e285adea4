"""The one door to a launch; what a launch would compile can be recorded there, without a GPU.

Kernels take NamedTuples of tensors and sizes, and as their last argument S, a NamedTuple of constants. What a field
holds, with its shape, stands beside it in the NamedTuple.

Triton's own door finds out at every call which compilation it needs. With NamedTuples that takes 30 to 45 microseconds
of a CPU, and a layer of exact ATLAS has 500 launches. What `_known` says of the arguments tells it in a third of that
time, so a compilation that is known is launched itself.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from atlas_kernels.gpu.assembler import take_sound_ptxas

take_sound_ptxas()

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel, as Triton's launcher asks for it.

    name: unique among all. kernel: the function under `@triton.jit`. signature: Triton's type of every argument,
    "*bf16", "*fp32", "i32", "constexpr", or a NamedTuple of such. A path is an argument's place, (2,), or that of a
    field of a NamedTuple, (0, 1). constants: the values of constexprs, and of what is None or 1, by path. hints: by
    path what else is known, such as that a pointer is a multiple of 16 bytes. cooperative: as `launch` is told. grid,
    arguments: of the recorded call.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constants: Mapping[tuple[int, ...], object]
    hints: Mapping[tuple[int, ...], list[Any]]
    num_warps: int
    num_stages: int
    cooperative: bool = False
    grid: tuple[int, ...] = field(default=(), compare=False)
    arguments: tuple[Any, ...] = field(default=(), compare=False, repr=False)


_recordings: list[tuple[str, list[Variant]]] = []


@contextmanager
def recording(title: str) -> Iterator[list[Variant]]:
    """Notes what the launches of its block would compile, in their order, and launches nothing.

    title: of the variants' names, with {} where the kernel's name stands. Tensors on the meta device suffice, whose
    addresses count as multiples of 16 bytes, as those of allocations are.
    """
    variants: list[Variant] = []
    _recordings.append((title, variants))
    try:
        yield variants
    finally:
        _recordings.pop()


_counters: list[Counter[str]] = []


@contextmanager
def counting(launches: Counter[str]) -> Iterator[None]:
    """Counts the launches of its block by the kernel's name, and launches nothing. All tensors are on the meta device:
    one that is not raises ValueError, as a GPU could not reach it."""
    _counters.append(launches)
    try:
        yield
    finally:
        _counters.pop()


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: NamedTuple,
    *,
    warps: int,
    stages: int = 1,
    cooperative: bool = False,
) -> None:
    """kernel[grid](*arguments, S), S the constants; within `recording` or `counting` it is noted instead.

    stages: of loads in flight in a loop. One is enough where a block's loads are few: more would cost shared memory.
    cooperative: the programs wait for each other, so all run at once; a grid for which there is no room is an error.
    """
    if _counters:
        for tensor in _tensors(arguments):
            if tensor.device.type != "meta":
                raise ValueError(f"{kernel.__name__} is given a tensor on {tensor.device}, which no GPU can reach")
        _counters[-1][kernel.__name__.removesuffix("_kernel")] += 1
        return
    if _recordings:
        settle_key(kernel)
        arguments = *arguments, _as_constants(constants)
        title, variants = _recordings[-1]
        name = title.format(kernel.__name__.removesuffix("_kernel"))
        found = _specialised(kernel, arguments)
        variants.append(Variant(name, kernel, *found, warps, stages, cooperative, grid, arguments))
        return
    # Triton launches on the current device, which need not be the tensors'.
    first = next(_tensors(arguments))
    with torch.cuda.device_of(first):
        if isinstance(kernel, JITFunction):
            _launch_compiled(kernel, grid, arguments, constants, (warps, stages, cooperative, first.device))
        else:  # interpreted
            kernel[grid](*arguments, constants)


_compiled: dict[Any, Any] = {}


def _launch_compiled(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: NamedTuple, how: tuple[Any, ...]
) -> None:
    key = kernel, constants, how, _known(arguments)
    arguments = *arguments, _as_constants(constants)
    if key in _compiled:
        _compiled[key][(*grid, 1, 1)[:3]](*arguments)
        return
    settle_key(kernel)
    warps, stages, cooperative, _ = how
    options = {"launch_cooperative_grid": True} if cooperative else {}
    _compiled[key] = kernel[grid](*arguments, num_warps=warps, num_stages=stages, **options)


@functools.lru_cache(maxsize=1024)
def _as_constants(constants: NamedTuple) -> NamedTuple:
    """The compiler knows fields as constants only where each says so."""
    return constants._make(map(tl.constexpr, constants))


def _known(argument: Any) -> Any:
    """All that a compilation may depend on of an argument: what Triton's binder looks at, in a form that can be a key.

    Of a tensor its dtype and whether its address is a multiple of 16; of a number whether it is 1, a multiple of 16,
    and which integer holds it; a constant itself.
    """
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, tuple):
        return type(argument), tuple(map(_known, argument))
    if isinstance(argument, tl.constexpr):
        return argument.value
    if isinstance(argument, int) and argument != 1:
        return argument % 16 == 0, -(2**31) <= argument < 2**31, argument < 2**63
    return argument


def settle_key(kernel: JITFunction) -> None:
    """Have Triton name `kernel`, and before it all that it calls: then its name in the cache on the disk is the same in
    every process.

    Triton makes a caller's name of what it knows of those it calls. It knows less where these have no name yet, so
    the name would depend on which kernels a process met before.
    """
    if kernel.hash is None:
        for name in kernel.fn.__code__.co_names:
            called = kernel.fn.__globals__.get(name)
            # A function may bear the name of one of the language that it calls.
            if isinstance(called, JITFunction) and called is not kernel:
                settle_key(called)
        kernel.cache_key  # noqa: B018  made when it is asked for


def _tensors(arguments: Any) -> Iterator[torch.Tensor]:
    """Those of the arguments and of their NamedTuples, in order."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _specialised(kernel: Any, arguments: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Signature, constants and hints, found out by Triton's own binder: the same for every compute capability."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialised, _ = bind(*arguments)
    _, *found = kernel._pack_args(backend, {}, bound, specialised, None)
    return tuple(found)
