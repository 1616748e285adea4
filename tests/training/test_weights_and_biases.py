"""Weights & Biases, whose package a stand-in takes the place of: what it refuses is a line, a run goes on by its id."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atlas_megatron.config import Config
from atlas_megatron.train import main
from atlas_megatron.training import weights_and_biases
from tests.support import tiny_run


class Error(Exception):
    """wandb.Error, of which its own errors are."""


class UsageError(Error):
    pass


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each start of a run there was given."""
    given: list[dict[str, Any]] = []
    stand_in = SimpleNamespace(Error=Error, init=lambda **words: given.append(words))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return given


def config_in(directory: Path) -> Config:
    directory.mkdir(parents=True, exist_ok=True)
    config = Config()
    return replace(
        config, run=replace(config.run, directory=str(directory)), log=replace(config.log, wandb="project")
    )


def test_a_run_keeps_its_id_wherever_it_lies(begun: list[dict[str, Any]], tmp_path: Path) -> None:
    weights_and_biases.start(config_in(tmp_path / "a" / "run"), 0)
    weights_and_biases.start(config_in(tmp_path / "b" / "run"), 0)
    (tmp_path / "a" / "run").rename(tmp_path / "moved")
    weights_and_biases.start(config_in(tmp_path / "moved"), 5)
    first, other, moved = begun
    # Two directories of one name are two runs; one that was moved is one.
    assert first["id"] != other["id"] and first["name"] == other["name"] == "run"
    assert moved["id"] == first["id"] and moved["resume"] == "allow"
    # From before ids were noted: by the directory's name.
    weights_and_biases.start(config_in(tmp_path / "old"), 5)
    assert begun[-1]["id"] == "old"


def test_without_a_key_the_run_is_refused_in_one_line(
    begun: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(**_: Any) -> None:
        raise UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuses)
    config = tiny_run.write(tmp_path)
    assert main([str(config), "log.wandb=project"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "log.wandb=project: Weights & Biases does not start (No API key" in said
    assert "WANDB_MODE=offline" in said
    # Nothing of a start that failed is left.
    assert not (tmp_path / "run").exists()
