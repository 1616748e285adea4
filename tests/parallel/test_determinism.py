"""Two runs of one configuration and layout are bit-equal; what cannot be on a GPU is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from atlas_megatron.config import Config, DeltaConfig, ModelConfig, TrainConfig
from atlas_megatron.parallel import determinism
from atlas_megatron.training.metrics import Record, read
from tests.support import tiny_run
from tests.support.layouts import LAYOUTS

DETERMINISTIC = TrainConfig(deterministic=True)


def taken(folder: Path) -> list[Record]:
    """The records of a run, without the times."""
    timed = ("step_seconds", "tokens_per_second", "tflops", "mfu", "eta_seconds")
    return [{name: value for name, value in record.items() if name not in timed} for record in read(folder)]


@pytest.mark.parallel
@pytest.mark.parametrize("layout", ["data", "tensor", "interleaved", "context"])
def test_a_rerun_is_bit_equal(tmp_path: Path, layout: str) -> None:
    config, pattern = tiny_run.write(tmp_path), "M-*-M-"
    given = [*LAYOUTS[layout].words(pattern), "train.deterministic=true", "train.micro_batch=1"]
    runs = [[*given, f"run.directory={tmp_path / name}"] for name in ("first", "second")]
    tiny_run.train_in(LAYOUTS[layout].processes, config, runs)
    first, second = taken(tmp_path / "first"), taken(tmp_path / "second")
    assert {"loss", "grad_norm", "validation_loss", "layers"} <= set().union(*first)
    assert first == second


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """As on a GPU whose environment is as it should be."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    yield monkeypatch
    torch.use_deterministic_algorithms(False)


def test_the_switch_is_torchs_own(gpu: pytest.MonkeyPatch) -> None:
    for wanted in (True, False):
        determinism.switch(Config(train=TrainConfig(deterministic=wanted)))
        assert torch.are_deterministic_algorithms_enabled() == wanted


def test_what_cannot_be_is_refused(gpu: pytest.MonkeyPatch) -> None:
    delta = Config(train=DETERMINISTIC, model=ModelConfig(pattern="D-"))
    with pytest.raises(ValueError, match="delta.impl='auto', whose kernels .* set delta.impl='chunked'"):
        determinism.switch(delta)
    determinism.switch(Config(train=DETERMINISTIC, model=ModelConfig(pattern="D-"), delta=DeltaConfig(impl="chunked")))
    gpu.setenv("NCCL_ALGO", "NVLS")
    with pytest.raises(ValueError, match="NCCL_ALGO is NVLS; set it to one of Tree, Ring"):
        determinism.switch(Config(train=DETERMINISTIC))
    gpu.delenv("CUBLAS_WORKSPACE_CONFIG")
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG is not set; set it to one of :4096:8"):
        determinism.switch(Config(train=DETERMINISTIC))
    determinism.switch(Config())
