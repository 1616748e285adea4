"""train.cuda_graph: what is captured, what a replay reads, and what is refused. The graph here is a stand-in: its
replay calls the captured schedule again, on the batches that the wrapper keeps in place."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import full_cuda_graph
from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader

from atlas_megatron.config import Config, load
from atlas_megatron.config.checks import validate
from atlas_megatron.mixers.memory import AtlasMixer
from atlas_megatron.model.build import build_model
from atlas_megatron.train import main
from atlas_megatron.training import capture
from benchmarks.fake_gpu import DEVICE, fake_gpu
from tests.support import tiny_run


class Schedule:
    """Core's schedule; keeps its last call, so that a graph can repeat it."""

    calls: list[dict[str, Any]] = []

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule

    def __call__(self, **call: Any) -> Any:
        Schedule.calls.append(call)
        return self.schedule(**call)


class Graph:
    replays = 0

    def register_generator_state(self, state: Any) -> None:
        pass

    def replay(self) -> None:
        Graph.replays += 1
        if Graph.replays == 1:  # a capture runs nothing; this stand-in's did
            return
        call, kept = Schedule.calls[-1], FullCudaGraphWrapper.result["training"]
        batches = iter(StaticBufferLoader.static_buffers["training"])
        again = FullCudaGraphWrapper.schedule(**call | {"data_iterator": [batches]})  # type: ignore[attr-defined]
        for old, new in zip(kept, again, strict=True):
            for name, tensor in new.items():
                old[name].copy_(tensor)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = lambda *_, **__: None  # noqa: E731
    monkeypatch.setattr(capture, "device", lambda: torch.device("cuda"))
    for name, value in {
        "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream, "stream": lambda _: nullcontext(),
        "graph": lambda *_, **__: nullcontext(), "synchronize": nothing, "graph_pool_handle": nothing,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(full_cuda_graph, "get_all_rng_states", dict)
    monkeypatch.setattr(full_cuda_graph.StaticBufferLoader, "static_buffers", {"training": [], "validation": []})
    plain = capture.get_forward_backward_func
    monkeypatch.setattr(capture, "get_forward_backward_func", lambda: Schedule(plain()))
    monkeypatch.setattr(FullCudaGraphWrapper, "schedule", staticmethod(lambda **call: plain()(**call)), raising=False)
    monkeypatch.setattr(Graph, "replays", 0)
    monkeypatch.setattr(Schedule, "calls", [])


def test_replayed_steps_train_as_eager_ones(stand_in: None, tmp_path: Path) -> None:
    tiny_run.write(tmp_path)
    words = ["train.stats_every=4", "train.steps=10", "train.micro_batch=2"]
    for name, value in (("eager", "false"), ("captured", "true")):
        directory = f"run.directory={tmp_path}/{name}"
        assert main([str(tmp_path / "tiny.toml"), *words, directory, f"train.cuda_graph={value}"]) == 0
    # Of ten steps 1, 4 and 8 measure and are eager; three more warm up, and one is captured.
    assert len(Schedule.calls) == capture.WARMUP + 1
    assert Graph.replays == 10 - 3 - capture.WARMUP
    assert tiny_run.losses(tmp_path / "captured") == tiny_run.losses(tmp_path / "eager")


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run.write(tmp_path)
    words = [str(tmp_path / "tiny.toml"), f"run.directory={tmp_path}/run", "train.cuda_graph=true"]
    assert main(words) == 2
    assert "train.cuda_graph=true wants a GPU" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 0
    assert "train.cuda_graph=true wants a GPU" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "hindrance",
    [
        "data.packed=true", "train.write_budget=0.1", "train.recompute=true", "parallel.pipeline=2",
        "parallel.context=2",
    ],
)  # fmt: skip
def test_what_no_graph_can_hold_is_refused(hindrance: str, tmp_path: Path) -> None:
    tiny_run.write(tmp_path)
    more = ["memory.write_gate=true", "memory.ns_step=sum"] if "budget" in hindrance else []
    config: Config = load(tmp_path / "tiny.toml", ["train.cuda_graph=true", hindrance, *more])
    with pytest.raises(ValueError, match=f"cuda_graph=true with {hindrance}"):
        validate(config, 2 if "parallel" in hindrance else 1)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("M-*-", ()),
        ("M-F-", ("memory.ns_period=1", "memory.norm=layer")),
        ("M-M-", ("memory.preset=omeganet", "memory.head_dim=16", "memory.omega_gates=source")),
        ("M-M-", ("memory.preset=titans", "memory.head_dim=16")),
        ("M-M-", ("memory.write_gate=true", "memory.ns_step=sum")),
        ("G-D-", ()),
    ],
)
def test_the_host_reads_nothing_of_a_step(
    pattern: str, words: tuple[str, ...], tmp_path: Path, single_process_megatron: None
) -> None:
    tiny_run.write(tmp_path)
    config = load(tmp_path / "tiny.toml", [f"model.pattern={pattern}", "train.precision=bfloat16", *words])
    model = build_model(config).bfloat16().to(DEVICE)
    for mixer in (module for module in model.modules() if isinstance(module, AtlasMixer)):
        mixer.memory = replace(mixer.memory, impl="triton")  # built with what this machine has
    tokens = torch.zeros(2, config.model.seq_length, dtype=torch.long, device=DEVICE)
    with fake_gpu() as counts:
        model(tokens, tokens, None, labels=tokens).float().mean().backward()
    assert counts.torch_launches and (counts.launches if "M" in pattern else not counts.launches)
