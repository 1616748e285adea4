"""A memory's chain shared by several programs: each goes through a slice of the hidden rows, and they meet at a chunk.

With one program a memory, 16 memories leave 116 of 132 multiprocessors idle. Most of a chunk's work is local to rows of
the hidden width: matrices, momenta and their gradients, h, z and theirs. What is summed over the rows crosses slices:
forward o = h W1; backward grad_e, grad_x and the gradients of to_w, to_s and last. A slice is a memory whose F is
F / SLICES, with its memory's tokens and tables: matrices [slots, G, F, ...] are [slots, G SLICES, F / SLICES, ...] as
they lie, and the functions of forward.py and write_backward.py serve both forms.

A chunk has two phases. In `give` a slice stores its parts of the sums in device memory. In `take` it adds those of all
slices, in their order, and goes on. Between the two stands `meet`, once a chunk: an atomic counter, which carries no
data, so equal inputs give equal bits. While one slice takes, another may already give at the next chunk, and grad_x is
taken a chunk later than the rest. So parts lie in three rounds, and none is overwritten before all have taken it.

All programs must run at once, or those that wait would keep the others from starting. The launch is cooperative: it
fails where they do not fit, and beside kernels of other streams it begins when there is room for all. Triton's
interpreter runs program after program, so there each phase is a launch of its own, of the same functions. Without a
GPU all is tested but `meet` and the loop around it, and of `meet` the order of its instructions. On an H200 a small
OmegaNet in slices agreed with float64 and gave equal bits (docs/results/gpu); tests/gpu/test_split_scan.py has not
run there.

What one program does of a chunk, sizes as in forward.py (79 sources); by count, not measured:

    SLICES                               1     2     4     8
    write: MFLOP                        34    17   8.5   4.2
    parts stored, KB                     -    20    20    20
    parts taken, KB                      -    40    81   162
    write_backward: MFLOP               90    46    24    13
    parts stored (grad_x twice), KB      -    62    62    62
    parts taken, KB                      -    84   127   214

Matrices move no more bytes in all. Every slice loads the chunk's tokens and tables, 80 KB forward and 220 backward; in
the backward each forms `seen` and `scores_met`, 2 MFLOP. Parts stay in L2: three rounds of 132 programs take 8 MB
forward and 17 MB backward. 128 programs, of 8 slices, take 21 MB a chunk from L2 forward and 26 MB backward: some
microseconds, as their products do. Whether 4 slices would be as fast, a GPU must tell.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from atlas_kernels.gpu.launch import launch
from atlas_kernels.gpu.scan.pieces import Shape, Sizes, tile

# How often the parts of a sum are stored side by side.
ROUNDS = 3
_ROUNDS: tl.constexpr = tl.constexpr(ROUNDS)
MULTIPROCESSORS = 132  # of the GPU for which launches are counted without one


class Parts(NamedTuple):
    """What the slices give each other; P = G SLICES programs, those of a memory side by side."""

    arrived_pointer: Any  # [G], zeros: how often its slices have arrived
    sources_pointer: Any  # [ROUNDS, P, I, V], of o, in the backward of grad_e
    x_pointer: Any = None  # [ROUNDS, P, I, D] of grad_x, in the backward alone, as the next
    rows_pointer: Any = None  # [ROUNDS, P, 3, BLOCK_I] of the gradients of to_w, of to_s, and of last's three


class Step(NamedTuple):
    n: Any  # the chunk
    takes: Any  # 1, or 0: it gives


class Meeting(NamedTuple):
    """The last argument of a split kernel, in place of the sizes."""

    sizes: Sizes
    parts: Parts
    step: Step | None = None  # of a launch that is one phase of one chunk


class Split(NamedTuple):
    """The split form of a kernel: all chunks, and one phase of one of them."""

    kernel: Any
    phase: Any
    backward: bool


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least; of the interpreter one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return MULTIPROCESSORS if device.type == "meta" else 1


def slices_of(memories: int, shape: Shape, device: torch.device) -> int:
    """How many programs share a memory: the most of 8, 4 and 2 that run at once and have whole blocks of rows, or 1."""
    room = multiprocessors(device) // memories
    return next((s for s in (8, 4, 2) if s <= room and shape.F % (s * shape.BLOCK_F) == 0), 1)


def launch_split(split: Split, slices: int, arguments: tuple[Any, ...], shape: Shape, *, warps: int) -> None:
    """`slices` programs a memory; arguments and shape as of the kernel that has one, sizes last."""
    *given, sizes = arguments
    rows = shape.F // slices
    # Two blocks of rows where there can be: of one alone the compiler makes a straight line, which spills.
    shape = shape._replace(F=rows, SLICES=slices, BLOCK_F=min(shape.BLOCK_F, max(16, rows // 2)))
    meeting = Meeting(sizes, _parts(split, given[0].x_pointer, sizes.G, shape))
    programs = (sizes.G * slices,)
    if can_wait(split.kernel):
        launch(split.kernel, programs, (*given, meeting), shape, warps=warps, cooperative=True)
    else:
        by_phases(split, programs, (*given, meeting), shape, warps=warps)


def can_wait(kernel: Any) -> bool:
    """Whether the programs of `kernel` run side by side: the interpreter's run one after another."""
    return isinstance(kernel, JITFunction)


def by_phases(split: Split, programs: tuple[int], arguments: tuple[Any, ...], shape: Shape, *, warps: int) -> None:
    """The same in as many launches as there are phases: what a program waits for, the end of a launch gives."""
    *given, meeting = arguments
    N = meeting.sizes.N
    for n in range(N - 1, -2, -1) if split.backward else range(N):
        for takes in (0, 1):
            step = Step(n, takes)
            launch(split.phase, programs, (*given, meeting._replace(step=step)), shape, warps=warps)


def _parts(split: Split, x: Tensor, G: int, shape: Shape) -> Parts:
    """x: [N, G, I, D], on the device of the launch."""
    I = x.shape[-2]  # noqa: E741
    empty = partial(x.new_empty, ROUNDS, G * shape.SLICES, dtype=torch.float32)
    arrived = x.new_zeros(G, dtype=torch.int32)
    backward = (empty(I, shape.D), empty(3, shape.BLOCK_I)) if split.backward else ()
    return Parts(arrived, empty(I, shape.V), *backward)


@triton.jit
def meet(arrived_pointer, turn, S: tl.constexpr):
    """Waits until all slices of a memory have come here `turn` times; what each stored before, all load after.

    arrived_pointer: at this memory's counter.
    """
    # All threads of this program have stored; the atomic's release then covers what they stored.
    tl.debug_barrier()
    tl.atomic_add(arrived_pointer, 1, sem="release", scope="gpu")
    while tl.atomic_add(arrived_pointer, 0, sem="acquire", scope="gpu") < turn * S.SLICES:
        pass
    # No thread loads before the one that waited has acquired.
    tl.debug_barrier()


@triton.jit
def round_of(n, slice_of, G, S: tl.constexpr):
    """The place of a slice among [ROUNDS, P] at chunk n; slice_of: g SLICES + the slice's number."""
    return n % _ROUNDS * (G * S.SLICES) + slice_of


@triton.jit
def add_parts(sums, pointer, place, at, ROWS, COLUMNS: tl.constexpr, S: tl.constexpr):
    """sums + what all slices of a memory gave, in their order; place: of the first, at: rows and columns of a part."""
    rows, columns = at
    for j in tl.static_range(S.SLICES):
        sums += tile(pointer + (place + j) * ROWS * COLUMNS, rows, columns, ROWS, COLUMNS)
    return sums
