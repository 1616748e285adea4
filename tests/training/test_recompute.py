"""Recomputation by layer count and by part: the same training in every layout, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from atlas_megatron.config import Config, ModelConfig, TrainConfig
from atlas_megatron.config.checks import validate
from atlas_megatron.estimate.memory import footprint
from atlas_megatron.train import main
from tests.support import tiny_run

TWO_STAGES = ["parallel.pipeline=2", "model.pattern=M-|*-"]
SOME = ["train.recompute=true", "train.recompute_layers=1"]
PARTS = ["train.recompute_modules=[\"mlp\"]"]


def words(folder: Path, *more: str) -> list[str]:
    given = ["train.steps=4", "train.schedule=constant", "train.warmup_steps=1", "train.validate_every=0"]
    # Without Newton-Schulz, which blows up what layouts round.
    given += ["data.validation=[]", "checkpoint.every=2"]
    return [*given, "memory.preset=omeganet", "train.micro_batch=1", f"run.directory={folder}", *more]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("recompute"))


def test_what_is_recomputed_changes_no_bit_and_may_change_at_a_resume(config: Path) -> None:
    folders = {name: config.parent / name for name in ("kept", "resumed")}
    tiny_run.train_in(1, config, [words(folders["kept"])])
    tiny_run.train_in(1, config, [words(folders["resumed"], "train.steps=2", *SOME)])
    tiny_run.train_in(1, config, [words(folders["resumed"], *PARTS)])
    assert tiny_run.losses(folders["resumed"]) == tiny_run.losses(folders["kept"])


@pytest.mark.parametrize("more", [SOME, PARTS], ids=["layers", "parts"])
def test_two_stages_recompute_as_one_process_keeps(config: Path, more: list[str]) -> None:
    folder, kept = config.parent / f"staged {len(more)}", config.parent / "kept alone"
    if not kept.is_dir():
        tiny_run.train_in(1, config, [words(kept)])
    tiny_run.train_in(2, config, [words(folder, *TWO_STAGES, *more)])
    assert tiny_run.losses(folder) == pytest.approx(tiny_run.losses(kept), rel=1e-5)


SMALL = Config(
    model=ModelConfig(pattern="M-*-|M-", hidden_size=64, ffn_hidden_size=96, vocab_size=128, seq_length=64),
    train=TrainConfig(global_batch=8, micro_batch=1, precision="float32"),
)
SMALL = replace(SMALL, parallel=replace(SMALL.parallel, pipeline=2))


def recomputed(**keys: object) -> Config:
    return replace(SMALL, train=replace(SMALL.train, **keys))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"recompute": True, "recompute_layers": 5}, "longest stage of model.pattern='M-*-|M-' has 4 layers; give 4"),
        ({"recompute": True, "recompute_layers": -1}, "train.recompute_layers=-1 must be 0 or more"),
        ({"recompute_layers": 2}, "set train.recompute=true, or recompute_layers=0"),
        ({"recompute": True, "recompute_modules": ("mlp",)}, "set train.recompute=false, or recompute_modules=[]"),
        ({"recompute_modules": ("core_attn",)}, "has 'core_attn'; use mlp, moe, shared_experts, layernorm, or train"),
        ({"recompute_modules": ("mlp", "layernorm")}, "without which core cannot recompute a norm; set model.transf"),
        ({"recompute_modules": ("mlp",), "cuda_graph": True}, "train.cuda_graph=true with train.recompute_modules"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(keys: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError) as raised:
        validate(recomputed(**keys), 2)
    assert said in str(raised.value)


def test_parts_of_layers_that_are_not_there_are_refused() -> None:
    config = recomputed(recompute_modules=("mlp",))
    config = replace(config, model=replace(config.model, pattern="M*|MM"))
    with pytest.raises(ValueError, match="has no - layer; leave it out"):
        validate(config, 2)


def test_the_more_is_recomputed_the_less_is_held() -> None:
    """Of the first stage: nothing, its MLPs, one to all of its four layers."""
    keys: list[dict[str, object]] = [{}, {"recompute_modules": ("mlp",)}, {"recompute_modules": ("mlp", "layernorm")}]
    parts = [footprint(recomputed(**own), 2, 0, bf16=False).total for own in keys]
    counted = [recomputed(recompute=True, recompute_layers=layers) for layers in (1, 2, 3, 4)]
    layers = [footprint(config, 2, 0, bf16=False).total for config in counted]
    assert parts == sorted(parts, reverse=True) and len(set(parts)) == 3
    assert [parts[0], *layers] == sorted([parts[0], *layers], reverse=True)
    assert layers[-1] == footprint(recomputed(recompute=True), 2, 0, bf16=False).total


def test_a_dry_run_says_what_is_recomputed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config), "--dry-run", *SOME, "train.recompute_layers=3"]) == 0
    assert "the first 3 layers of each stage" in capsys.readouterr().out
    assert main([str(config), "--dry-run", *PARTS]) == 0
    assert "mlp of core's layers" in capsys.readouterr().out
