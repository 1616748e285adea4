"""What there is to compile: each kernel with the constants it is launched with, so that a machine without a GPU can
hold every one to its registers, spills and shared memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel.

    name: "kernel shape dtype", unique. kernel: the function under `@triton.jit`. signature: triton's type of every
    argument that is no constant, "*bf16", "*fp32", "i32", "i32:16" (a multiple of 16), in order. constants: the values
    of the constexprs.
    """

    name: str
    kernel: Callable[..., None]
    signature: Mapping[str, str]
    constants: Mapping[str, object]
    num_warps: int
    num_stages: int
