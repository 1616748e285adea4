"""Megatron-Core without a GPU: what `parallel.cpu` redirects."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from atlas_megatron.parallel import cpu
from atlas_megatron.parallel import device as own
from atlas_megatron.parallel.device import backend, device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: cpu.install() has nothing to do")


@pytest.fixture(autouse=True)
def installed() -> None:
    assert cpu.install()


def test_installing_again_changes_nothing() -> None:
    before = torch.cuda.synchronize, torch.cuda.Stream, torch.cuda.get_rng_state
    assert cpu.install()
    assert (torch.cuda.synchronize, torch.cuda.Stream, torch.cuda.get_rng_state) == before
    assert device() == torch.device("cpu")
    assert backend() == "gloo"


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[int, int] = {}
    library = SimpleNamespace(mallopt=given.__setitem__)
    monkeypatch.setattr(own.ctypes, "CDLL", lambda name: library)
    own.keep_freed_memory()
    assert given == {own.M_MMAP_MAX: 0, own.M_TRIM_THRESHOLD: 2**31 - 1}
    del library.mallopt
    own.keep_freed_memory()  # another library: nothing to ask


def test_tensors_asked_for_on_cuda_are_on_the_cpu() -> None:
    made = [
        torch.zeros(2, device="cuda"),
        torch.empty(2, device=torch.device("cuda", 0)),
        torch.tensor([1.0], device="cuda:0"),
        torch.ones(2).new_zeros(3, device="cuda"),
        torch.ones(2).to("cuda"),
        torch.ones(2).to(device="cuda", dtype=torch.float64),
        torch.ones(2).cuda(),
        torch.nn.Linear(2, 2).cuda().weight,
        torch.arange(3, device=torch.cuda.current_device()),
    ]
    assert [t.device.type for t in made] == ["cpu"] * len(made)
    assert made[5].dtype == torch.float64
    assert torch.ones(2).to(torch.float16).dtype == torch.float16


def test_tensor_types_are_spelled_as_on_a_gpu() -> None:
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def test_streams_and_events_do_nothing() -> None:
    stream, event = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        event.record()
    assert stream.query() and event.query()
    torch.cuda.synchronize()


def test_named_random_states_are_apart_and_repeat() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    def draws() -> list[torch.Tensor]:
        tracker = CudaRNGStatesTracker()
        torch.manual_seed(0)
        tracker.add("first", 1)
        tracker.add("second", 2)
        drawn = [torch.rand(4)]
        for name in ("first", "second", "first"):
            with tracker.fork(name):
                drawn.append(torch.rand(4))
        return [*drawn, torch.rand(4)]

    drawn, again = draws(), draws()
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert len({tuple(d.tolist()) for d in drawn}) == len(drawn)
    torch.manual_seed(0)
    expected = [torch.rand(4), torch.rand(4)]  # the default state goes on as if nothing had been drawn between
    assert torch.equal(drawn[0], expected[0]) and torch.equal(drawn[-1], expected[1])


def test_numbers_too_small_to_be_normal_are_zeros() -> None:
    assert torch.tensor([2e-38]).mul(0.5).item() == 0.0
