"""What the fake GPU counts, and what it refuses as a GPU would."""

from __future__ import annotations

import pytest
import torch

from benchmarks.fake_gpu import DEVICE, FakeGpuError, fake_gpu

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
