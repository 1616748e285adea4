"""The language-model experiment: equal sizes, cells that are kept, a picture and a table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.core.optimizer import emerging_optimizers

from atlas_megatron.config import load
from atlas_megatron.config.checks import validate
from atlas_megatron.model.build import num_params
from experiments import language_model
from experiments.shared.protocol import Protocol
from tests.support import pages, tiny_run


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(language_model, "BASE", tiny_run.write(tmp_path, "M-*-M-"))
    monkeypatch.setattr(language_model, "RUNS", tmp_path / "runs")
    return tmp_path


def test_every_contender_has_the_first_ones_parameters() -> None:
    of = Protocol(language_model.BASE, (), 100, (), (1,), language_model.RUNS)
    wanted = num_params(load(language_model.BASE))
    every = language_model.contenders(tuple(language_model.CONTENDERS))
    for name, contender in every.items():
        config = load(of.base, of.words_of(contender, next(iter(every.values())), 100, 1, 1e-3))
        assert num_params(config) == pytest.approx(wanted, rel=1e-3), name
        assert config.train.lr == 1e-3 and config.run.seed == 1
        validate(config, 1)
        assert config.train.optimizer == "adamw", name
    for name, contender in language_model.OPTIMIZERS.items():
        config = load(of.base, of.words_of(contender, every["atlas"], 100, 1, 1e-3))
        validate(config, 1)
        assert config.train.optimizer == ("muon" if "Muon" in name else "adamw"), name
        assert config.model == load(of.base).model, name


def test_a_gpu_sized_base_repeats_the_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        language_model, "BASE", language_model.record.ROOT / "configs/experiments/language_model_gpu.toml"
    )
    words = language_model.contenders(("Gated DeltaNet",))["Gated DeltaNet"].words
    assert "model.pattern=" + "G-*-G-" * 4 in words
    test_every_contender_has_the_first_ones_parameters()


@pytest.mark.slow
def test_quick_leaves_results_and_does_nothing_twice(tiny: Path, no_more_jobs: Callable[[], None]) -> None:
    words = ["--quick", "--out", str(tiny / "out")]
    assert language_model.main(words) == 0
    cells = json.loads((tiny / "out" / "language_model.json").read_text())["cells"]
    # Two rates for a quarter of the steps, and a seed at the better one. Optimizers: the higher rate, and a seed each.
    assert len(cells) == 3 * len(language_model.QUICK) + 2 + len(language_model.OPTIMIZERS)
    seed = cells["members: atlas, seed 1"]
    assert seed["parameters"] == num_params(load(language_model.BASE))
    better = min(language_model.RATES[:2], key=lambda r: cells[f"members: atlas, lr {r:g}"]["bits_per_byte"])
    assert f"train.lr={better}" in seed["words"] and seed["tokens"] > cells["members: atlas, lr 0.003"]["tokens"]
    # A run that two tables show is made once.
    adam, muon = cells["optimizers: AdamW, seed 1"], cells["optimizers: Muon, seed 1"]
    assert adam == cells["members: atlas, lr 0.003"] and muon == cells["optimizers: Muon, lr 0.003"]
    assert "train.optimizer=muon" in muon["words"] and muon["bits_per_byte"] != adam["bits_per_byte"]
    assert (tiny / "out" / "language_model.png").read_bytes().startswith(b"\x89PNG")
    text = (tiny / "out" / "language_model.md").read_text()
    pages.hold(text)
    assert "one sign in every seed" in " ".join(text.split()) and "| Muon | Muon moves" in text
    no_more_jobs()
    assert language_model.main(words) == 0


def test_a_missing_package_or_corpus_is_said_before_any_run(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--quick", "--out", str(tiny / "out")]
    monkeypatch.setattr(emerging_optimizers, "HAVE_EMERGING_OPTIMIZERS", False)
    assert language_model.main(words) == 2
    assert "pip install emerging-optimizers==" in capsys.readouterr().err
    (tiny / "train.idx").unlink()
    assert language_model.main(words) == 2
    assert "train.idx is missing; run make quickstart once" in capsys.readouterr().err
