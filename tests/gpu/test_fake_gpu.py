"""What the fake GPU counts, and what it refuses as a GPU would."""

from __future__ import annotations

import pytest
import torch

from atlas_kernels import MemoryRule, check_implementation
from atlas_kernels.gpu.newton_schulz import coefficient_table
from atlas_megatron.config import MemoryConfig
from benchmarks.contenders import contender
from benchmarks.fake_gpu import DEVICE, FakeGpuError, fake_gpu
from tests.support.problems import gradients

x = torch.empty(4, 8, device=DEVICE)


def test_operators_and_their_bytes_are_counted():
    with fake_gpu() as counts:
        (x.view(8, 4) + 1).t()
    assert counts.operators == {"add": 1} and counts.bytes == 2 * x.nbytes


def test_a_value_that_the_host_reads_is_refused():
    with fake_gpu(), pytest.raises((RuntimeError, NotImplementedError)):
        x.sum().item()


def test_a_list_as_an_index_is_refused():
    with fake_gpu(), pytest.raises(FakeGpuError, match="host"):
        x[..., [3]]


def test_a_tensor_of_the_host_is_refused():
    with fake_gpu(), pytest.raises((RuntimeError, FakeGpuError)):
        x * torch.ones(4, 8)


def test_what_deterministic_algorithms_refuse_is_refused(deterministic):
    with fake_gpu(), pytest.raises(FakeGpuError, match="cumsum"):
        x.cumsum(-1)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


MEMORIES = {
    "omeganet": MemoryConfig(heads=2, head_dim=64, ns_steps=0),
    "a write a chunk": MemoryConfig(heads=2, head_dim=64, ns_period=64, ns_step="sum"),
}


@pytest.mark.parametrize("impl", ["chunked", "triton"])
@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_a_memory_runs_under_deterministic_algorithms(memory, impl, deterministic):
    run = contender(memory, batch=2, tokens=150, products=torch.bfloat16, device=DEVICE, impl=impl)
    with fake_gpu() as counts:
        run()
    assert counts.launches if impl == "triton" else counts.torch_launches


def test_what_a_contender_gives_is_not_added_up():
    """In a graph that is replayed it would be, into the leaves' `.grad`."""
    run = contender(MEMORIES["omeganet"], batch=1, tokens=3)
    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)


def test_the_tests_own_numbers_go_to_the_device():
    leaf = torch.ones(3, device=DEVICE, requires_grad=True)
    assert gradients([leaf * 2], {"leaf": leaf})["leaf"].device.type == DEVICE


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_what_a_call_needs_of_the_host_is_there_before_the_first(impl, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: t.device.type == DEVICE))
    weights = tuple(torch.empty(2, 64, 64, device=DEVICE) for _ in range(2))
    coefficient_table.cache_clear()
    check_implementation(impl, MemoryRule(ns_steps=3), weights, torch.bfloat16)
    before = coefficient_table.cache_info()
    coefficient_table(3, MemoryRule().ns_coefficients, torch.device(DEVICE))
    assert (before.misses, coefficient_table.cache_info().hits) == (1, 1)
