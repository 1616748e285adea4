"""Collectives of a single process, done on the spot.

gloo would do them in threads of its own, and each copies large tensors with an OpenMP team of its own. libgomp then
counts more threads than processors and lets all of them sleep at every barrier: a training step on two cores took 2.0
seconds instead of 1.4. A world of one has nobody to wait for.
"""

from __future__ import annotations

from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.futures import Future

NAME = "alone"


class AloneProcessGroup(dist.ProcessGroup):
    """A process group of one: what goes in comes out."""

    def getBackendName(self) -> str:
        return NAME

    def barrier(self, opts: object = None) -> dist.Work:
        return _done(None)

    def broadcast(self, tensors: list[Tensor], opts: object = None) -> dist.Work:
        return _done(tensors)

    allreduce = allreduce_coalesced = reduce = broadcast

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: object = None) -> dist.Work:
        for (output,), source in zip(outputs, inputs, strict=True):
            _copy(output, source)
        return _done(outputs)

    gather = allgather

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: object = None) -> dist.Work:
        for output, (source,) in zip(outputs, inputs, strict=True):
            _copy(output, source)
        return _done(outputs)

    scatter = reduce_scatter

    def _allgather_base(self, output: Tensor, source: Tensor, opts: object = None) -> dist.Work:
        _copy(output, source)
        return _done(output)

    _reduce_scatter_base = _allgather_base

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: object = None
    ) -> dist.Work:
        for output, source in zip(outputs, inputs, strict=True):
            _copy(output, source)
        return _done(outputs)

    reduce_scatter_tensor_coalesced = alltoall = allgather_into_tensor_coalesced

    def alltoall_base(
        self, output: Tensor, source: Tensor, output_sizes: list[int], input_sizes: list[int], opts: object = None
    ) -> dist.Work:
        _copy(output, source)
        return _done(output)


def backend() -> str:
    """The backend's name, known to torch.distributed from now on."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create, devices=["cpu"])
    return NAME


def _create(store: dist.Store, rank: int, size: int, timeout: object) -> AloneProcessGroup:
    return AloneProcessGroup(rank, size)


def _copy(output: Tensor, source: Tensor) -> None:
    # Megatron gathers and scatters in place: views of one buffer.
    if output.data_ptr() != source.data_ptr():
        output.copy_(source.view_as(output))


def _done(result: object) -> dist.Work:
    future: Future = Future()
    future.set_result(result)
    return _create_work_from_future(future)
