"""Checkpoints become Hugging Face folders and runs again without a byte changed; what is not whole leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from atlas_megatron.checkpoint import checkpoint
from atlas_megatron.commands import convert_hf
from atlas_megatron.config import ParallelConfig, load
from atlas_megatron.data.tokenizer import train_tokenizer
from atlas_megatron.hf import export, importing
from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from atlas_megatron.parallel import world
from atlas_megatron.training.resuming import going_on, longer_sequences
from tests.support import hf_checkpoints as checkpoints
from tests.support import processes, tiny_run
from tests.support.hf_and_megatron import CALM, settings

ROOT = Path(__file__).parents[2]
PATTERN = "M-*-A-C-F-R-L-D-G-"
# Every kind of tensor; a tied embedding, which a pipeline's last stage holds too.
EVERY = settings(PATTERN, **CALM)
UNTIED = settings("M-*-", tied=False)
HIERARCHY = settings("M-A-", locals=("4/8", "2/16", "4/8"), projection=True, read="chunk", write_gate=True, **CALM)
CUT = replace(EVERY, model=replace(EVERY.model, pattern="M-*-A-|C-F-R-L-D-G-"))
LAYOUTS = {
    "tensor": replace(EVERY, parallel=ParallelConfig(tensor=2)),
    "pipeline": replace(CUT, parallel=ParallelConfig(pipeline=2)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints `every`, `untied`, `hierarchy` and `bfloat16`."""
    root = tmp_path_factory.mktemp("saved")
    with checkpoints.one_process():
        checkpoints.save(EVERY, root / "every")
        checkpoints.save(UNTIED, root / "untied")
        checkpoints.save(HIERARCHY, root / "hierarchy")
        checkpoints.save(UNTIED, root / "bfloat16", dtype=torch.bfloat16)
    return root


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every weight of a Hugging Face folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value.flatten().view(torch.uint8), theirs[name].flatten().view(torch.uint8)), name


def parameters(folder: Path) -> dict[str, Tensor]:
    """Every parameter of a checkpoint."""
    source = export.read_source(folder)
    return source.read([name.megatron for name, _ in source.parameters])


@pytest.mark.parametrize("name", ["every", "untied", "hierarchy", "bfloat16"])
def test_the_way_there_and_back_changes_no_byte(saved: Path, tmp_path: Path, name: str) -> None:
    folder = export.export(saved / name, tmp_path / "model", shard_size=20_000)
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 1 and all(file.stat().st_size < 40_000 for file in files)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == ("bfloat16" if name == "bfloat16" else "float32")
    importing.import_folder(folder, tmp_path / "run")
    (step,) = checkpoint.folder_of(tmp_path / "run").iterdir()
    assert checkpoint.is_whole(step)
    assert_same(parameters(step), parameters(saved / name))
    again = export.export(tmp_path / "run", tmp_path / "again", shard_size=20_000)
    assert_same(tensors(again), tensors(folder))
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()


def test_an_import_may_lengthen_sequences(saved: Path, tmp_path: Path) -> None:
    """The checkpoint says what its weights were trained on: from there the first start tells what follows."""
    folder = export.export(saved / "untied", tmp_path / "model")
    importing.import_folder(folder, tmp_path / "run", ["model.seq_length=128"])
    (step,) = checkpoint.folder_of(tmp_path / "run").iterdir()
    run, before = load(tmp_path / "run" / checkpoint.CONFIG), load(step / checkpoint.CONFIG)
    assert (run.model.seq_length, before.model.seq_length) == (128, 32)
    assert longer_sequences(going_on(run, before), before, 0).startswith("sequences grow from 32 to 128 tokens")
    checkpoint.check_same_model(step, run)
    with pytest.raises(ValueError, match=r"seq_length: 16, the folder has 32 \(it may grow, not shrink\); leave"):
        importing.import_folder(folder, tmp_path / "shorter", ["model.seq_length=16"])
    # How far gradients go back travels both ways.
    importing.import_folder(folder, tmp_path / "reach", ["model.seq_length=128", "train.gradient_reach=8"])
    config = load(tmp_path / "reach" / checkpoint.CONFIG)
    described = export.described(config)
    assert (config.train.gradient_reach, described.gradient_reach) == (8, 8)
    described.architectures, described.auto_map = ["AtlasForCausalLM"], export.AUTO_MAP
    described.save_pretrained(folder)
    importing.import_folder(folder, tmp_path / "again")
    assert load(tmp_path / "again" / checkpoint.CONFIG).train.gradient_reach == 8


def test_checkpoints_of_other_layouts_are_the_same_model(saved: Path, tmp_path: Path) -> None:
    processes.run(2, checkpoints.save_again, LAYOUTS, saved / "every", tmp_path)
    one = tensors(export.export(saved / "every", tmp_path / "one"))
    for name in LAYOUTS:
        assert_same(tensors(export.export(tmp_path / name, tmp_path / f"{name} model")), one)


def test_a_padded_vocabulary_is_cut(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "untied", tmp_path / "padded")
    file = tmp_path / "padded" / checkpoint.CONFIG
    file.write_text(file.read_text().replace("vocab_size = 64", "vocab_size = 61"))
    _mark_whole(tmp_path / "padded")
    found = tensors(export.export(tmp_path / "padded", tmp_path / "model"))
    whole = parameters(saved / "untied")
    assert torch.equal(found["lm_head.weight"], whole["output_layer.weight"][:61])
    assert torch.equal(found["model.embed_tokens.weight"], whole["embedding.word_embeddings.weight"][:61])
    model = AtlasForCausalLM.from_pretrained(tmp_path / "model")
    assert model(torch.tensor([[60, 1, 2]])).logits.shape[-1] == 61


def test_the_code_that_travels_is_the_code_here(saved: Path, tmp_path: Path) -> None:
    folder = export.export(saved / "untied", tmp_path / "model")
    kernels = {file.name: file for file in (ROOT / "kernels/atlas_kernels").glob("*.py")}
    model = {file.name: file for file in (ROOT / "atlas_megatron/hf").glob("*_atlas.py")}
    assert not kernels.keys() & model.keys()
    shipped = {file.name: file for file in folder.glob("*.py")}
    assert shipped.keys() >= model.keys() | {"op.py", "chunked.py", "reference.py", "dual.py"}
    for name, file in shipped.items():
        assert file.read_bytes() == (kernels | model)[name].read_bytes(), name


def test_it_loads_where_nothing_of_this_is_installed(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "every", tmp_path / "checkpoint")
    text = "the memory learns at test time what the window of the text says " * 40
    train_tokenizer([text], 257, tmp_path / "tokenizer")
    # The model has 64 tokens: a tokenizer of as many.
    tokenizer = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    kept = {word: number for word, number in tokenizer["model"]["vocab"].items() if number < 64}
    tokenizer["model"] |= {"vocab": kept, "merges": []}
    (tmp_path / "checkpoint/tokenizer.json").write_text(json.dumps(tokenizer))
    shutil.copy(tmp_path / "tokenizer/tokenizer_config.json", tmp_path / "checkpoint")
    _mark_whole(tmp_path / "checkpoint")
    folder = export.export(tmp_path / "checkpoint", tmp_path / "model")
    nothing = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    words = [sys.executable, str(ROOT / "tests/support/load_without_package.py"), str(folder), str(tmp_path)]
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(words, env=nothing | offline | modules, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = torch.load(tmp_path / "said.pt")
    model = AtlasForCausalLM.from_pretrained(folder)
    prompt = torch.arange(2 * 21).view(2, 21) % 64
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, said["logits"])
        assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), said["continued"])
    assert said["config"].startswith("transformers_modules.") and said["dtype"] == torch.float32
    # What it saves itself travels on.
    assert said["code"] == sorted(file.name for file in folder.glob("*.py"))
    assert model.load_memory(tmp_path / "memory").position == 21


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made from the export of a short one, whose steps change nothing."""
    from atlas_megatron.train import main

    root = tmp_path_factory.mktemp("imported")
    config = str(tiny_run.write(root, "M-*-M-"))
    assert main([config, "train.steps=1", "train.warmup_steps=0", "train.validate_every=0", "data.validation=[]"]) == 0
    assert convert_hf.main(["export", str(root / "run"), str(root / "model")]) == 0
    still = ["train.lr=1e-30", "train.min_lr=1e-30", "train.weight_decay=0.0", "train.steps=2", "train.warmup_steps=1"]
    data = [f'data.train=["{root}/train"]', "train.validate_every=0", "train.global_batch=4", "train.micro_batch=2"]
    assert convert_hf.main(["import", str(root / "model"), str(root / "imported"), *still, *data]) == 0
    return root / "imported"


def test_training_goes_on_from_a_folder(imported: Path, tmp_path: Path) -> None:
    from atlas_megatron.train import main

    config = load(imported / "config.toml")
    assert config.run.directory == str(imported) and config.data.tokenizer == str(imported / "tokenizer")
    started = parameters(checkpoint.folder_of(imported) / "step_00000000")
    # In bfloat16, too, whose master weights the optimizer holds.
    for precision in ("float32", "bfloat16"):
        run = shutil.copytree(imported, tmp_path / precision)
        assert main([str(run / "config.toml"), f"run.directory={run}", f"train.precision={precision}"]) == 0
        trained = parameters(checkpoint.folder_of(run) / "step_00000002")
        assert_same(trained, {name: value.to(getattr(torch, precision)) for name, value in started.items()})
    try:
        model, _ = checkpoint.load_model(imported)
        assert_same(dict(model.named_parameters()), started)
    finally:
        world.leave()


@pytest.mark.parallel
@pytest.mark.parametrize("layout", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_so_it_does_in_other_layouts(imported: Path, tmp_path: Path, layout: str) -> None:
    run = shutil.copytree(imported, tmp_path / "run")
    tiny_run.train_in(2, run / "config.toml", [[f"run.directory={run}", layout]])
    trained = parameters(checkpoint.folder_of(run) / "step_00000002")
    assert_same(trained, parameters(checkpoint.folder_of(run) / "step_00000000"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("direction", ["export", "import"])
def test_what_is_interrupted_leaves_nothing(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, direction: str
) -> None:
    source = saved / "untied"
    if direction == "import":
        source = export.export(source, tmp_path / "model")

    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(export, "save_file", failing)
    monkeypatch.setattr(importing, "write_shards", failing)
    before = sorted(tmp_path.iterdir())
    assert convert_hf.main([direction, str(source), str(tmp_path / "target")]) != 0
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_lists_every_parameter(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export.export(saved / "untied", tmp_path / "model")
    assert convert_hf.main(["export", str(saved / "untied"), str(tmp_path / "other"), "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert len(listed.splitlines()) == len(parameters(saved / "untied"))
    assert "decoder.layers.0.mixer.linear_qkvg.weight" in listed and "[128, 32]" in listed
    assert convert_hf.main(["import", str(folder), str(tmp_path / "run"), "--dry-run"]) == 0
    assert capsys.readouterr().out == listed
    assert sorted(tmp_path.iterdir()) == [folder]


def test_mistakes_are_named_in_one_line(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, target = export.export(saved / "untied", tmp_path / "model"), str(tmp_path / "target")
    wide = shutil.copytree(saved / "untied", tmp_path / "wide")
    file = wide / checkpoint.CONFIG
    file.write_text(file.read_text().replace("ffn_hidden_size = 48", "ffn_hidden_size = 64"))
    talkative = shutil.copytree(saved / "untied", tmp_path / "talkative")
    train_tokenizer(["a text"], 257, talkative)
    torn = shutil.copytree(saved / "untied", tmp_path / "torn")
    next(torn.glob("*.distcp")).unlink()
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    for changed in (wide, talkative):
        _mark_whole(changed)
    cases = {
        ("export", str(tmp_path), target): "is no checkpoint and no run with a whole one",
        ("export", str(torn), target): "is damaged: ",
        ("export", str(wide), target): "decoder.layers.1.mlp.linear_fc1.weight is [96, 32], not [128, 32]; decoder",
        ("export", str(talkative), target): "has 257 tokens, more than the model's vocab_size=64",
        ("export", str(saved / "untied"), str(folder)): "exists; choose another target",
        ("export", str(saved / "untied"), target, "train.steps=3"): "export takes no 'train.steps=3'",
        ("export", str(saved / "untied"), target, "--shard-size", "big"): "--shard-size 'big' is no size",
        ("import", str(saved / "untied"), target): "is no Hugging Face folder",
        ("import", str(other), target): "model.embed_tokens.weight is [64, 32], not [64, 16]",
        ("import", str(folder), target, "memory.window=4"): "overrides change the model: memory.window: 4",
        ("import", str(folder), target, 'memory.locals=["4/8"]'): "overrides change the model: memory.locals: ('4/8',)",
        ("import", str(folder), target, "train.stps=4"): "unknown config key 'train.stps'",
        ("import", str(folder), str(folder)): "exists; choose another target",
    }
    before = sorted(tmp_path.iterdir())
    for words, text in cases.items():
        assert convert_hf.main(words) == 2, words
        said = capsys.readouterr().err
        assert text in said and said.count("\n") == 1, (words, said)
    assert sorted(tmp_path.iterdir()) == before


def _mark_whole(folder: Path) -> None:
    """Write the marker of a checkpoint anew, after its files were changed."""
    (folder / checkpoint.MARKER).unlink()
    sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / checkpoint.MARKER).write_text(json.dumps({"step": 0, "files": sizes}))
