"""Muon through Megatron-Core: what it moves and how, what is refused, and checkpoints that change their layout."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import emerging_optimizers
from megatron.core.utils import get_model_config

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.config import AttentionConfig, Config, MemoryConfig, ModelConfig, TrainConfig
from atlas_megatron.config.checks import validate
from atlas_megatron.estimate.optimizer import update_of
from atlas_megatron.model.build import build_model
from atlas_megatron.train import main
from atlas_megatron.training import muon
from atlas_megatron.training.metrics import read
from atlas_megatron.training.optimizer import build_optimizer, wrap
from tests.support import tiny_run

needs_package = pytest.mark.skipif(not find_spec("emerging_optimizers"), reason="emerging-optimizers is not installed")
SMALL = Config(
    model=ModelConfig(pattern="M-*-", hidden_size=32, ffn_hidden_size=48, vocab_size=64, seq_length=32),
    memory=MemoryConfig(heads=2, head_dim=8, expansion=2, chunk=8, window=4, ns_period=8, gate_rank=4),
    attention=AttentionConfig(heads=2, head_dim=8, window=8),
    train=TrainConfig(
        optimizer="muon", lr=0.1, min_lr=0.1, warmup_steps=0, clip_grad=0.0, weight_decay=0.0, muon_nesterov=False
    ),
)


def changed(pattern: str = "M-*-", **keys: Any) -> Config:
    """SMALL with these layers and keys of [train]."""
    model = replace(SMALL.model, pattern=pattern)
    return replace(SMALL, model=model, train=replace(SMALL.train, **keys))


@needs_package
@pytest.mark.parametrize("memories", [False, True])
def test_the_matrices_of_linears_are_muons(single_process_megatron: None, memories: bool) -> None:
    config = changed("M-*-A-C-F-R-L-D-G-", muon_memories=memories)
    model = build_model(config)
    muon.mark(model, config, bf16=False)
    starts = ("start_first", "start_second", "start_gate")
    for name, parameter in model.named_parameters():
        *_, module, last = name.split(".")
        linear = last == "weight" and module.startswith("linear_") and module != "linear_gates"
        assert getattr(parameter, muon.MARK) == (linear or (memories and last in starts)), name


def one_step(config: Config) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By name, what a first step with random gradients adds to each parameter of a fresh model; and the gradients."""
    torch.manual_seed(5)
    model = build_model(config)
    chunk = wrap(model, get_model_config(model), config)
    optimizer, scheduler = build_optimizer(config, [chunk], bf16=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: torch.randn_like(value) for name, value in before.items()}
    for name, parameter in model.named_parameters():
        parameter.main_grad.copy_(gradients[name])
    scheduler.step(1)
    optimizer.step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}, gradients


@needs_package
def test_a_step_is_orthogonal_of_each_part_and_adamws_elsewhere(single_process_megatron: None) -> None:
    config = changed(muon_num_ns_steps=9, muon_coefficient_type="polar_express", muon_memories=True)
    steps, gradients = one_step(config)
    layer, attention = "decoder.layers.0.mixer", "decoder.layers.2.mixer"
    head, hidden = 8, 32
    parts = {
        # [heads, parts, rows of a part]: query, key, value and output gate are four matrices, each of all heads.
        **{f"{layer}.qkvg {n}": (f"{layer}.linear_qkvg.weight", (2, 4, head, hidden), n) for n in range(4)},
        **{f"{attention}.qkv {n}": (f"{attention}.linear_qkv.weight", (2, 3, head, hidden), n) for n in range(3)},
    }
    matrices = {said: steps[name].view(shape)[:, n].reshape(-1, hidden) for said, (name, shape, n) in parts.items()}
    matrices |= {name: steps[name] for name in (f"{layer}.linear_out.weight", "decoder.layers.1.mlp.linear_fc1.weight")}
    matrices |= {f"head {n}": steps[f"{layer}.start_first"][n] for n in range(2)}
    for name, matrix in matrices.items():
        scale = config.train.lr * config.train.muon_extra_scale_factor * max(matrix.shape) ** 0.5
        values = torch.linalg.svdvals(matrix) / scale
        assert values.min() > 0.9 and values.max() < 1.1, name
    for name in ("embedding.word_embeddings.weight", f"{layer}.linear_gates.weight", f"{layer}.convolution"):
        # The first step of Adam goes by the sign of the gradient alone.
        assert torch.allclose(steps[name], -config.train.lr * gradients[name].sign(), rtol=1e-3), name


@needs_package
def test_a_fused_linear_may_stay_whole(single_process_megatron: None) -> None:
    config = changed(muon_num_ns_steps=9, muon_coefficient_type="polar_express", muon_split_qkv=False)
    step = one_step(config)[0]["decoder.layers.0.mixer.linear_qkvg.weight"]
    values = torch.linalg.svdvals(step) / (0.1 * 0.2 * 64**0.5)
    assert values.min() > 0.9 and values.max() < 1.1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (changed(optimizer="sgd"), "train.optimizer='sgd' is unknown; choose one of adamw, muon"),
        (changed(optimizer="adamw", muon_memories=True), "set train.muon_memories=false, or train.optimizer='muon'"),
        (changed(optimizer="adamw", muon_layer_wise=True), "set train.muon_layer_wise=false, or train.optim"),
        (changed("*-", muon_memories=True), "has no memory; set it false"),
        (changed(muon_layer_wise=True, precision="float32"), "set train.precision='bfloat16', or"),
        (changed(muon_layer_wise=True, muon_scalar_optimizer="lion"), "set muon_scalar_optimizer='adam', or"),
        (changed(muon_scalar_optimizer="sgd"), "choose one of adam, lion"),
        (changed(muon_scale_mode="big"), "choose one of spectral, shape_scaling, unit_rms_norm"),
        (changed(muon_coefficient_type="jordan"), "choose one of simple, quintic, polar_express"),
        (changed(muon_tp_mode="alone"), "choose one of duplicated, distributed, blockwise"),
        (changed(muon_fp32_matmul_prec="low"), "choose one of auto, medium, high, highest"),
        (changed(muon_num_ns_steps=0), "train.muon_num_ns_steps=0 must be greater than 0"),
        (changed(muon_momentum=1.0), "train.muon_momentum=1.0 must lie in [0, 1)"),
        (changed(muon_extra_scale_factor=float("nan")), "must be greater than 0"),
    ],
)
def test_what_does_not_go_together_is_refused(config: Config, said: str) -> None:
    with pytest.raises(ValueError) as error:
        validate(config, 1)
    assert said in str(error.value)


@needs_package
def test_core_knows_the_choices() -> None:
    for kind in emerging_optimizers.get_supported_coefficient_types():
        if kind != "custom":
            validate(changed(muon_coefficient_type=kind), 1)


def test_a_missing_package_is_named_with_its_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emerging_optimizers, "HAVE_EMERGING_OPTIMIZERS", False)
    path = str(tiny_run.write(tmp_path))
    assert main([path, "--dry-run", "train.optimizer=muon"]) == 0
    assert f"not on this machine: train.optimizer='muon' wants the package emerging-optimizers, which is not " \
        f"installed: {muon.INSTALL}" in capsys.readouterr().out
    assert main([path, "train.optimizer=muon"]) == 2
    said = capsys.readouterr().err
    assert muon.INSTALL in said and said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's precision is bfloat16")
def test_layer_wise_states_want_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emerging_optimizers, "HAVE_EMERGING_OPTIMIZERS", True)
    train = changed(muon_layer_wise=True).train
    assert "set train.precision='bfloat16'" in muon.wrong_here(train, bf16=False)
    assert not muon.wrong_here(train, bf16=True)


def test_a_dry_run_says_what_moves_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny_run.write(tmp_path))
    assert main([path, "--dry-run", "train.optimizer=muon", "parallel.tensor=2", "world=4"]) == 0
    said = capsys.readouterr().out
    # Two mixers of width 16 in 32: four and three inputs and an output; two MLPs of 48.
    moved = 32 * (16 * (4 + 1) + 16 * (3 + 1)) + 2 * 3 * 32 * 48
    for line in ("Muon, its states on every replica", f"{moved:,}", "data: gradient all-reduce", "tensor: all-gather"):
        assert line in said
    assert main([path, "--dry-run"]) == 0
    assert "AdamW, its states sharded" in capsys.readouterr().out


def test_flops_of_newton_schulz() -> None:
    assert update_of(changed(), "-", bf16=False).flops == 5 * sum(4 * 32**2 * n + 2 * 32**3 for n in (96, 48))
    assert update_of(replace(SMALL, train=TrainConfig()), "-", bf16=False).flops == 0


# Layouts of the runs below, by their words; all of the pattern M-*-.
BF16 = ["train.precision=bfloat16"]
LAYER_WISE = [*BF16, "train.muon_layer_wise=true"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tensor": (2, ["parallel.tensor=2"]),
    "data": (2, []),
    "pipeline": (2, ["parallel.pipeline=2", "model.pattern=M-|*-"]),
}
SAVED, LAST = 2, 4


def words(folder: Path, layout: str, more: list[str]) -> tuple[int, list[str]]:
    size, own = LAYOUTS[layout]
    given = ["train.optimizer=muon", "memory.preset=omeganet", "train.micro_batch=1", f"train.steps={LAST}"]
    given += ["train.validate_every=0", "data.validation=[]", f"checkpoint.every={SAVED}", f"run.directory={folder}"]
    return size, [*given, "train.stats_every=100", "train.warmup_steps=1", *more, *own]


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read(folder)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("muon"))


def trained(config: Path, layout: str, more: list[str], name: str = "") -> Path:
    """The run of four steps in a layout; made once."""
    folder = config.parent / (name or f"{layout}{len(more)}")
    if not folder.is_dir():
        size, given = words(folder, layout, more)
        tiny_run.train_in(size, config, [given])
    return folder


def moved(config: Path, first: str, second: str, before: list[str], after: list[str]) -> Path:
    """What goes on in the second layout from step 2 of a run in the first one."""
    folder = config.parent / f"{first} to {second} {len(before)}{len(after)}"
    shutil.copytree(trained(config, first, before), folder)
    shutil.rmtree(checkpoint.folder_of(folder) / f"step_{LAST:08d}")
    size, given = words(folder, second, after)
    tiny_run.train_in(size, config, [given])
    return folder


PAIRS = [
    pytest.param("one", "one", [], id="resumed"),
    pytest.param("tensor", "one", [], id="tensor 2 to 1"),
    pytest.param("one", "tensor", [], marks=pytest.mark.parallel, id="tensor 1 to 2"),
    pytest.param("one", "data", [], marks=pytest.mark.parallel, id="data 1 to 2"),
    pytest.param("pipeline", "one", [], marks=pytest.mark.parallel, id="pipeline 2 to 1"),
    pytest.param("one", "pipeline", BF16, marks=pytest.mark.parallel, id="bfloat16, pipeline 1 to 2"),
    pytest.param("data", "one", LAYER_WISE, id="layer-wise, data 2 to 1"),
    pytest.param("one", "data", LAYER_WISE, marks=pytest.mark.parallel, id="layer-wise, data 1 to 2"),
    pytest.param("tensor", "data", LAYER_WISE, marks=pytest.mark.parallel, id="layer-wise, tensor 2 to data 2"),
    pytest.param("pipeline", "one", LAYER_WISE, marks=pytest.mark.parallel, id="layer-wise, pipeline 2 to 1"),
]


@needs_package
@pytest.mark.parametrize(("first", "second", "more"), PAIRS)
def test_another_layout_takes_the_next_steps(config: Path, first: str, second: str, more: list[str]) -> None:
    ours, theirs = losses(moved(config, first, second, more, more)), losses(trained(config, first, more))
    assert len(ours) == LAST
    if first == second:
        assert ours == theirs
    # In bfloat16 layouts round differently: 2^-8 of what a linear gives, in losses of 5.6.
    assert ours == pytest.approx(theirs, rel=1e-3 if more else 1e-5)


@needs_package
def test_layer_wise_states_change_nothing(config: Path) -> None:
    """To the bit: only who computes an update differs."""
    assert losses(trained(config, "data", LAYER_WISE)) == losses(trained(config, "data", BF16))


@needs_package
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["train.optimizer=adamw"], "train.optimizer: 'adamw', the checkpoint has 'muon'"),
        (["train.muon_memories=true"], "train.muon_memories: True, the checkpoint has False"),
        (LAYER_WISE, "train.muon_layer_wise: True, the checkpoint has False"),
    ],
)
def test_states_of_another_optimizer_are_refused(
    config: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(config, "one", [])
    before = (folder / "config.toml").read_bytes()
    _, given = words(folder, "one", [*more, f"train.steps={2 * LAST}"])
    assert main([str(config), *given]) == 2
    error = capsys.readouterr().err
    assert said in error and "begin a new run from its weights" in error and error.count("\n") == 1
    assert (folder / "config.toml").read_bytes() == before


@needs_package
def test_another_rate_holds_after_a_resume(config: Path) -> None:
    """The settings are the configuration's; the states, and how many steps they have seen, the checkpoint's."""
    folder = config.parent / "another rate"
    shutil.copytree(trained(config, "one", []), folder)
    size, given = words(folder, "one", [f"train.steps={LAST + 1}", "train.lr=0", "train.min_lr=0"])
    given = [word.replace("lr=0", "lr=1e-12") for word in given]
    tiny_run.train_in(size, config, [given])
    assert read(folder)[-1]["lr"] <= 1e-12


@needs_package
def test_lion_moves_the_rest(config: Path) -> None:
    _, given = words(config.parent / "lion", "one", ["train.muon_scalar_optimizer=lion"])
    # The package compiles Lion's update, which takes a CPU a minute.
    with torch.compiler.set_stance("force_eager"):
        assert main([str(config), *given]) == 0
    found = losses(config.parent / "lion")
    assert len(found) == LAST and found[0] == losses(trained(config, "one", []))[0] and found[-1] < found[0]


@needs_package
@pytest.mark.parallel
def test_a_replica_with_nothing_to_write_ends_its_writing(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = trained(config, "data", ["checkpoint.async_save=true"], "written beside")
    assert "Exception in thread" not in capfd.readouterr().err
    assert checkpoint.is_whole(checkpoint.folder_of(folder) / f"step_{LAST:08d}")
