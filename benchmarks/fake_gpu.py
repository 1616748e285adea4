"""A GPU that computes nothing: the real host code on meta tensors, at real shapes, in a second.

It counts the kernels that a call would launch and the torch operators that would each launch one of torch's. It fails
where a GPU would: at a tensor on another device, at a value that the host reads (`.item()`, `.tolist()`), at an index
or a copy that comes from the host, at what `torch.use_deterministic_algorithms` refuses there. What it cannot show:
numbers, times, races, the memory of a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from atlas_kernels.gpu.launch import counting

DEVICE = "meta"
# Operators that make no kernel run: they only describe memory, or take it.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"}
NO_KERNEL |= {"view", "_unsafe_view", "expand", "transpose", "t", "permute", "unsqueeze", "squeeze", "select", "slice"}
NO_KERNEL |= {"split", "split_with_sizes", "unbind", "unfold", "as_strided", "diagonal", "_reshape_alias"}


class FakeGpuError(RuntimeError):
    """What a GPU, or a CUDA graph that captures the call, would have refused."""


@dataclass
class Counts:
    """kernels: launches by the kernel's name; operators: torch operators that launch a kernel, by name; bytes: what
    these read and write."""

    kernels: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    bytes: int = 0

    @property
    def launches(self) -> int:
        return self.kernels.total()

    @property
    def torch_launches(self) -> int:
        return self.operators.total()


class _Operators(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts
        self.known = WeakIdKeyDictionary()  # made here, on the GPU

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        name = op.overloadpacket.__name__
        # torch makes a tensor of a list that is an index without an operator; on a GPU it is a copy that waits.
        if "index" in name and any(not t.is_floating_point() and t not in self.known for t in given):
            raise FakeGpuError(f"{name} takes an index from the host; a slice, or an index made on the GPU, does not")
        if name == "cumsum" and torch.are_deterministic_algorithms_enabled():
            summed = kwargs.get("dtype") if kwargs else None
            if (summed or given[0].dtype).is_floating_point:
                raise FakeGpuError("cumsum of floating point numbers is refused by torch.use_deterministic_algorithms")
        out = op(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.known.update((t, None) for t in made if t.device.type == DEVICE)
        if all(t.device.type == DEVICE for t in (*given, *made)):
            if name not in NO_KERNEL and made:
                self.counts.operators[name] += 1
                self.counts.bytes += sum(t.numel() * t.element_size() for t in (*given, *made))
        # A number of the host may meet a tensor of the GPU; it is an argument of the kernel.
        elif any(t.device.type == DEVICE for t in (*given, *made)) and any(
            t.device.type != DEVICE and t.dim() for t in (*given, *made)
        ):
            shapes = ", ".join(f"{list(t.shape)} on {t.device}" for t in (*given, *made))
            raise FakeGpuError(f"{name} takes a tensor of the host to the GPU or meets one there: {shapes}")
        return out


@contextmanager
def fake_gpu() -> Iterator[Counts]:
    """Counts what its block would launch. Tensors of the block are on `DEVICE`; backwards are counted too."""
    counts = Counts()
    with counting(counts.kernels), _Operators(counts):
        yield counts
