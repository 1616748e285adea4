"""Runs of layers with local memories: they go on bit-equal, and no other hierarchy takes their checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.commands import convert_hf
from atlas_megatron.config import load
from atlas_megatron.evaluate import command
from atlas_megatron.model.build import build_model
from atlas_megatron.parallel import world
from atlas_megatron.train import main
from tests.support import tiny_run

WORDS = ["train.steps=4", "checkpoint.every=2", "memory.preset=omeganet", "memory.window=4"]
KEYS = ['memory.locals=["4/16", "2/8"]', "memory.projection=true", "memory.read=chunk"]
# Another hierarchy, and what is said of it.
OTHERS = [
    (['memory.locals=["4/16"]'], "memory.locals: ('4/16',), the checkpoint has ('4/16', '2/8')"),
    (['memory.locals=["2/8", "4/16"]'], "memory.locals: ('2/8', '4/16'), the checkpoint has ('4/16', '2/8')"),
    (["memory.locals=[]", "memory.projection=false"], "memory.locals: (), the checkpoint has ('4/16', '2/8')"),
    (["memory.projection=false"], "memory.projection: False, the checkpoint has True"),
    (["memory.shard=16"], "memory.shard: 16, the checkpoint has 0"),
    (["memory.read=token"], "memory.read: 'token', the checkpoint has 'chunk'"),
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a config and of its run, trained without a stop, every second step saved."""
    root = tmp_path_factory.mktemp("hierarchy")
    assert main([str(tiny_run.write(root, "M-A-")), *WORDS, *KEYS]) == 0
    return root


def saved_in(run: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.folder_of(run).iterdir())


def parameters(run: Path) -> dict[str, torch.Tensor]:
    try:
        model, _ = checkpoint.load_model(run)
        return dict(model.named_parameters())
    finally:
        world.leave()


def test_resuming_is_bit_equal(unbroken: Path, tmp_path: Path) -> None:
    run = shutil.copytree(unbroken / "run", tmp_path / "run")
    shutil.rmtree(checkpoint.folder_of(run) / "step_00000004")
    assert main([str(unbroken / "tiny.toml"), *WORDS, *KEYS, f"run.directory={run}"]) == 0
    assert tiny_run.losses(run) == tiny_run.losses(unbroken / "run")
    ours, theirs = parameters(run), parameters(unbroken / "run")
    assert ours.keys() == theirs.keys() and any("local_first" in name for name in ours)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(("words", "said"), OTHERS, ids=[" ".join(words) for words, _ in OTHERS])
def test_another_hierarchy_does_not_go_on(
    unbroken: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = saved_in(unbroken / "run")
    assert main([str(unbroken / "tiny.toml"), *WORDS, *KEYS, *words, "train.steps=6"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert saved_in(unbroken / "run") == before


def test_nor_starts_from_weights(unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of a folder, imported, and those that a run begins with."""
    folder, target = tmp_path / "model", tmp_path / "imported"
    assert convert_hf.main(["export", str(unbroken / "run"), str(folder)]) == 0
    for words, _ in (OTHERS[0], OTHERS[4]):
        assert convert_hf.main(["import", str(folder), str(target), *words]) == 2
        said = capsys.readouterr().err
        assert f"overrides change the model: {words[0].partition('=')[0]}: " in said and said.count("\n") == 1
        assert not target.exists()
    config = load(unbroken / "tiny.toml", [*WORDS, *KEYS, f"run.directory={target}"])
    with tiny_run.a_world_that_is_left():
        world.join(config)
        checkpoint.save_weights(build_model(config), replace(config))
    given = [str(unbroken / "tiny.toml"), *WORDS, f"run.directory={target}"]
    assert main([*given, *KEYS, 'memory.locals=["8/16", "2/8"]']) == 2
    assert "memory.locals: ('8/16', '2/8'), the checkpoint has ('4/16', '2/8')" in capsys.readouterr().err
    assert main([*given, *KEYS, "train.steps=1", "train.warmup_steps=0"]) == 0


def test_it_is_evaluated_as_what_it_is(unbroken: Path, tmp_path: Path) -> None:
    """A run and its export read a text alike: both know their hierarchy."""
    assert convert_hf.main(["export", str(unbroken / "run"), str(tmp_path / "model")]) == 0
    (tmp_path / "text.txt").write_text("the window of the text says what the memory learns. " * 12, encoding="utf-8")
    found = []
    for name, source in (("run", unbroken / "run"), ("export", tmp_path / "model")):
        words = ["perplexity", source, "--text", tmp_path / "text.txt", "--lengths", "100", "--out", tmp_path / name]
        with tiny_run.a_world_that_is_left():
            assert command.main([str(word) for word in (*words, "--samples", "4", "--batch", "2")]) == 0
        cells = json.loads((tmp_path / name / "perplexity.json").read_text())["cells"]
        found.append({place: cell["mean_loss"] for place, cell in cells.items() if "mean_loss" in cell})
    ours, theirs = found
    assert ours.keys() == theirs.keys() and any(place.startswith("100 tokens") for place in ours)
    for place, losses in ours.items():
        assert losses == pytest.approx(theirs[place], abs=1e-5)
