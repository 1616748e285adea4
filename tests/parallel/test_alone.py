"""Collectives in a world of one process: what goes in comes out."""

from collections.abc import Iterator

import pytest
import torch
from torch import distributed as dist

from atlas_megatron.parallel import alone


@pytest.fixture(autouse=True)
def world_of_one() -> Iterator[None]:
    dist.init_process_group(alone.backend(), store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_tensors_come_out_as_they_went_in() -> None:
    x = torch.arange(6.0)
    for collective in (dist.all_reduce, lambda t: dist.broadcast(t, 0), lambda t: dist.reduce(t, 0)):
        y = x.clone()
        collective(y)
        assert torch.equal(y, x)
    for collective in (dist.all_gather_into_tensor, dist.reduce_scatter_tensor, dist.all_to_all_single):
        y = torch.empty(6)
        collective(y, x)
        assert torch.equal(y, x)
    y = [torch.empty(6)]
    dist.all_gather(y, x)
    assert torch.equal(y[0], x)
    dist.gather(x + 1, y, dst=0)
    assert torch.equal(y[0], x + 1)
    dist.scatter(y[0], [x], src=0)
    assert torch.equal(y[0], x)
    dist.reduce_scatter(y[0], [x + 2])
    assert torch.equal(y[0], x + 2)


def test_in_place_and_asynchronous() -> None:
    """As the distributed optimizer calls them: on views of its one buffer, in a subgroup, waiting later."""
    group, buffer = dist.new_group([0]), torch.arange(6.0)
    for collective in (dist.reduce_scatter_tensor, dist.all_gather_into_tensor):
        work = collective(buffer[0:6], buffer, group=group, async_op=True)
        work.wait()
        assert torch.equal(buffer, torch.arange(6.0))


def test_objects() -> None:
    found: list = [None]
    dist.all_gather_object(found, {"step": 3})
    assert found == [{"step": 3}]
    dist.gather_object("x", found, dst=0)
    assert found == ["x"]
    dist.broadcast_object_list(found, src=0)
    dist.scatter_object_list(found, [7], src=0)
    assert found == [7]
    dist.barrier()
