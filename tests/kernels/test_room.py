"""What a call may hold for its backward, and what then computes its segments."""

import itertools
from pathlib import Path

import pytest
import torch

from atlas_kernels import MemoryRule, chunked, room
from atlas_kernels.chunked import cut
from tests.support.problems import assert_close, gradients, problem, state_tensors

CHUNK, CPU = 8, torch.device("cpu")


def test_a_limit_is_taken_in_place_of_the_memory():
    assert room.may_hold(10, CPU, 10) and not room.may_hold(11, CPU, 10)


def test_small_graphs_and_those_without_memory_are_held_unasked(monkeypatch):
    monkeypatch.setattr(room, "_free", lambda device: pytest.fail("asked"))
    assert room.may_hold(room.ALWAYS, CPU)
    assert room.may_hold(1e15, torch.device("meta"))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_larger_ones_are_held_up_to_a_share_of_what_is_free(kind, monkeypatch):
    monkeypatch.setattr(room, "_free", lambda device: 64e9)
    most = room.SHARES[kind] * 64e9
    assert room.may_hold(most, torch.device(kind)) and not room.may_hold(most + 1, torch.device(kind))


def test_what_is_allocated_on_a_gpu_counts_without_asking_its_driver_again(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (70, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)
    room._room_of_gpu.cache_clear()
    for allocated, free in ((0, 80), (30, 50)):
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device, n=allocated: n)
        assert room._free(torch.device("cuda", 0)) == free
    assert len(asked) == 1
    room._room_of_gpu.cache_clear()


def test_a_container_has_no_more_than_its_limit(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal:  3000 kB\nMemAvailable:  2000 kB\n",
        "/sys/fs/cgroup/memory.max": "max\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000\n",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": "400000\n",
    }

    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert room._free_of_host() == 600000
    del files["/sys/fs/cgroup/memory/memory.usage_in_bytes"]
    assert room._free_of_host() == 2000 * 1024
    files.clear()
    assert room._free_of_host() == 0.5 * room._all_of_host() > 0


def test_ranks_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(room, "_free_of_host", lambda: 8e9)
    assert room._free(CPU) == 8e9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert room._free(CPU) == 2e9


def test_what_is_held_is_one_segment():
    assert cut(0, 4096, 64, whole=True) == [(64, 64)]
    assert cut(70, 200, 64, whole=True) == [(1, 58), (2, 64), (1, 14)]
    assert cut(70, 5, 64, whole=True) == [(1, 5)]


SCANS = [{"ns_steps": 0}, {"ns_steps": 0, "momentum": False}, {"ns_period": CHUNK}, {"ns_period": CHUNK, "ns_steps": 2}]


@pytest.mark.parametrize("writes", SCANS, ids=["momentum", "sum", "once", "once, two steps"])
def test_a_scan_is_what_its_chunks_are_one_by_one(writes, monkeypatch):
    """Segments of an mlp as one function, held and recomputed, against chunk by chunk, for graphs too large."""
    for norm, loss, share in itertools.product(("none", "layer"), ("l2", "dot"), (1.0, 0.3)):
        found = {}
        for held, segment in ((None, 1e9), (0, 1e9), (0, 0)):
            monkeypatch.setattr(chunked, "HELD_BYTES", held)
            monkeypatch.setattr(chunked, "SEGMENT_BYTES", segment)
            rule = MemoryRule(window=3, chunk=CHUNK, norm=norm, loss=loss, anchor_gradient=share, **writes)
            p = problem(rule, 4 * CHUNK + 3, residual=True, key=5, value=4, hidden=12)
            y, state = p.run("chunked", 0, None)
            outputs = {"y": y, **state_tensors(state)}
            found[held, segment] = outputs | gradients(list(outputs.values()), p.leaves())
        one_by_one = found.pop((0, 0))
        for scanned in found.values():
            assert_close(scanned, one_by_one)


@pytest.mark.parametrize("writes", SCANS[::2], ids=["momentum", "once"])
def test_whole_chunks_of_an_mlp_are_scanned(writes, monkeypatch):
    monkeypatch.setattr(chunked, "_chunk_by_chunk", lambda *_: pytest.fail("chunk by chunk"))
    p = problem(MemoryRule(window=3, chunk=CHUNK, **writes), 3 * CHUNK, hidden=12)
    p.run("chunked")


@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("writes", [*SCANS[:3], {"ns_period": 2}], ids=["momentum", "sum", "once", "four times"])
@pytest.mark.parametrize("memory", ["mlp", "gated_mlp"])
def test_held_and_recomputed_to_the_bit(memory, writes, share, monkeypatch):
    """What is free when a call is made does not change a rerun."""
    rule = MemoryRule(memory, window=5, chunk=CHUNK, norm="layer", anchor_gradient=share, **writes)
    found = []
    for held in (None, 0):
        monkeypatch.setattr(chunked, "HELD_BYTES", held)
        p = problem(rule, 9 * CHUNK + 3, key=8, value=8, hidden=16, dtype=torch.float32)
        y, state = p.run("chunked", 0, None)
        outputs = {"y": y, **state_tensors(state)}
        found.append(outputs | gradients(list(outputs.values()), p.leaves()))
    for name, t in found[0].items():
        assert torch.equal(t, found[1][name]), name
