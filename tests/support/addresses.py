"""Every address that an interpreted kernel loads or stores is inside of a tensor that it was given.

Triton's interpreter takes an address as it comes. What is a little beyond a tensor meets another one, on a CPU as on a
GPU, and says nothing; this says which kernel it is, and how far it is beyond.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter


class AddressError(AssertionError):
    """A kernel touched memory that it was not given."""


@contextmanager
def checked_addresses() -> Iterator[None]:
    """Raises AddressError out of a launch of its block that touches anything else than its arguments' storages."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    usual = builder.create_masked_load, builder.create_masked_store, executor.__call__
    given: list[tuple[str, numpy.ndarray, numpy.ndarray]] = []

    def check(pointers: Any, mask: Any) -> None:
        touched = numpy.asarray(pointers.data)[numpy.asarray(mask.data, dtype=bool)].astype(numpy.int64).ravel()
        if not touched.size:
            return
        size = pointers.get_element_ty().primitive_bitwidth // 8
        name, starts, ends = given[-1]
        at = numpy.searchsorted(starts, touched, side="right") - 1
        inside = (at >= 0) & (touched + size <= ends[numpy.clip(at, 0, None)])
        if not inside.all():
            first = int(touched[~inside][0])
            near = int(numpy.abs(ends - first).min())
            raise AddressError(f"{name}: {(~inside).sum()} of {touched.size} addresses are in none of its tensors; "
                               f"the first is {near} bytes from the next end")  # fmt: skip

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return usual[0](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return usual[1](self, pointers, values, mask, *rest)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        storages = {t.untyped_storage() for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)}
        ranges = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.nbytes())
        starts, ends = (numpy.array(side, dtype=numpy.int64) for side in zip(*ranges, strict=True))
        given.append((self.fn.__name__, starts, ends))
        try:
            return usual[2](self, *arguments, **options)
        finally:
            given.pop()

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, call
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = usual
