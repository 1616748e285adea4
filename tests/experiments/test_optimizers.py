"""The comparison of optimizers: cells that are kept, a picture and a table; what it needs is asked for first."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from megatron.core.optimizer import emerging_optimizers

from atlas_megatron.config import load
from atlas_megatron.config.checks import validate
from experiments import optimizers
from experiments.shared.protocol import Protocol
from tests.support import pages, tiny_run


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(optimizers, "BASE", tiny_run.write(tmp_path, "M-*-M-"))
    monkeypatch.setattr(optimizers, "RUNS", tmp_path / "runs")
    return tmp_path


def test_every_contender_is_valid_and_one_model() -> None:
    of = Protocol(optimizers.BASE, optimizers.WORDS, 1000, (), (1,), optimizers.RUNS)
    first = optimizers.CONTENDERS["AdamW"]
    configs = {
        name: load(of.base, of.words_of(contender, first, 1000, 1, 3e-3))
        for name, contender in optimizers.CONTENDERS.items()
    }
    for config in configs.values():
        validate(config, 1)
        assert config.model == configs["AdamW"].model
    assert [c.train.optimizer for c in configs.values()] == ["adamw", "muon", "muon"]


@pytest.mark.skipif(not find_spec("emerging_optimizers"), reason="emerging-optimizers is not installed")
def test_quick_leaves_results_and_does_nothing_twice(tiny: Path, no_more_jobs: Callable[[], None]) -> None:
    words = ["--quick", "--out", str(tiny / "out")]
    assert optimizers.main(words) == 0
    cells = json.loads((tiny / "out" / "optimizers.json").read_text())["cells"]
    # Two rates for a quarter of the steps, and a seed at the better one.
    assert len(cells) == 3 * len(optimizers.QUICK)
    muon = cells["optimizers: Muon, seed 1"]
    assert "train.optimizer=muon" in muon["words"]
    assert muon["bits_per_byte"] != cells["optimizers: AdamW, seed 1"]["bits_per_byte"]
    assert (tiny / "out" / "optimizers.png").read_bytes().startswith(b"\x89PNG")
    text = (tiny / "out" / "optimizers.md").read_text()
    pages.hold(text)
    assert "has one sign in every seed" in " ".join(text.split()) and "| Muon |" in text
    no_more_jobs()
    assert optimizers.main(words) == 0


def test_a_missing_package_or_corpus_is_said_before_any_run(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--quick", "--out", str(tiny / "out")]
    monkeypatch.setattr(emerging_optimizers, "HAVE_EMERGING_OPTIMIZERS", False)
    assert optimizers.main(words) == 2
    assert "pip install emerging-optimizers==" in capsys.readouterr().err
    (tiny / "train.idx").unlink()
    assert optimizers.main(words) == 2
    assert "train.idx is missing; run make quickstart once" in capsys.readouterr().err
