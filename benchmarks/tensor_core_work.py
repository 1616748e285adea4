"""How much of the tensor cores' work in a compiled kernel is done twice, and how many programs a multiprocessor holds.

A layout deals the warps of a program over a product's rows and columns. Where it has more warps than the product has
rows, the warps left over compute the same rows again: 8 warps in a column cover 128 rows, and a product of 64 runs
twice. The layouts stand in Triton's GPU code (TTGIR): `warpsPerCTA` and `instrShape` beside each product's shape.

On sm_90 four warps together multiply 64 rows by 8 to 256 columns. On sm_80 a warp's instruction covers 16 x 8, so more
warps fit a product, but one with few columns may run twice as well. On sm_100 one thread issues each product for all
warps: nothing runs twice and the ratio is 1; that 64 rows use half of the 128 lanes is not counted.
"""

from __future__ import annotations

import math
import re

_LAYOUT = re.compile(
    r"^(#\w+) = #ttg\.nvidia_mma<\{.*warpsPerCTA = \[(\d+), (\d+)\], instrShape = \[(\d+), (\d+)", re.MULTILINE
)
_LOOP = re.compile(r"scf\.for %\S+ = (%\S+) to (%\S+) step (%\S+)")
_CONSTANT = re.compile(r"^%c(-?\d+)(_\w+)?$")
_PRODUCT = re.compile(
    r"(?:tt\.dot|ttng\.warp_group_dot) .* : \S+<(\d+)x(\d+)x[^*]* \* \S+<\d+x(\d+)x.* -> tensor<\S+, (#\w+)>"
)
_TENSOR_MEMORY_PRODUCT = re.compile(r"ttng\.tc_gen5_mma .* : !ttg\.memdesc<(\d+)x(\d+)x.*?!ttg\.memdesc<\d+x(\d+)x")


def executed_over_useful(ttgir: str) -> float | None:
    """Tensor-core work issued over the products' arithmetic; None of a kernel without tensor-core products.

    A product in a loop counts as often as the loop turns, where that is known; of other loops once.
    """
    useful, executed = multiply_adds(ttgir)
    return round(executed / useful, 2) if useful else None


def multiply_adds(ttgir: str, again: int = 1) -> tuple[float, float]:
    """Of one program: (those of its products' arithmetic, those issued to tensor cores).

    again: how often a loop turns of which the code does not say it.
    """
    layouts = {name: tuple(map(int, numbers)) for name, *numbers in _LAYOUT.findall(ttgir)}
    useful = executed = 0.0
    depth, loops = 0, []  # where each loop around a line ends, and how often it turns
    for line in ttgir.splitlines():
        times = math.prod(turns for _, turns in loops)
        if (found := _PRODUCT.search(line)) and found[4] in layouts:
            rows, inner, columns = map(int, found.groups()[:3])
            warps_down, warps_across, tall, broad = layouts[found[4]]
            useful += times * inner * rows * columns
            executed += times * inner * _whole(rows, warps_down * tall) * _whole(columns, warps_across * broad)
        elif found := _TENSOR_MEMORY_PRODUCT.search(line):
            work = times * math.prod(map(int, found.groups()))
            useful, executed = useful + work, executed + work
        if (turns := _turns(line)) is not None:
            loops.append((depth, turns or again))
        depth += line.count("{") - line.count("}")
        while loops and depth <= loops[-1][0]:
            loops.pop()
    return useful, executed


def loop_turns(ttgir: str) -> list[int | None]:
    """How often every loop turns, in the order of the code; None where the code does not say it."""
    return [turns or None for turns in map(_turns, ttgir.splitlines()) if turns is not None]


def _whole(size: int, tile: int) -> int:
    return math.ceil(size / tile) * tile


def _turns(line: str) -> int | None:
    """How often the loop that begins in this line turns; 0 where it does not say so, None where none begins."""
    loop = _LOOP.search(line)
    if not loop:
        return 0 if "scf.while" in line else None
    found = [_CONSTANT.match(name) for name in loop.groups()]
    if not all(found):
        return 0
    first, end, step = (int(match[1]) for match in found if match)
    return max(0, math.ceil((end - first) / step))


# Of a multiprocessor, bytes of shared memory by compute capability; each program takes 1 KB more than it asks for. All
# have 65,536 registers, dealt to warps by 256, 64 warps, 32 programs, and sm_100 512 columns of tensor memory.
_SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
_REGISTERS, _WARPS, _PROGRAMS, _COLUMNS = 1 << 16, 64, 32, 512


def programs_per_sm(arch: int, warps: int, registers: int, shared: int, tensor_columns: int) -> int:
    """How many programs of `warps` warps run on one multiprocessor of sm_<arch> at once.

    registers a thread; shared in bytes, tensor_columns in columns, of a program.
    """
    room = [_PROGRAMS, _WARPS // warps, _SHARED[arch] // (shared + 1024)]
    room.append(_REGISTERS // (256 * math.ceil(32 * registers / 256)) // warps)
    if tensor_columns:
        room.append(_COLUMNS // tensor_columns)
    return min(room)
