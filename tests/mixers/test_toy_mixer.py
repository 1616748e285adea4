"""A mixer that is registered from outside trains, resumes, is estimated, exported and decoded; no other file knows it.

docs/extending.md walks through this test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atlas_megatron import mixers
from atlas_megatron.checkpoint.checkpoint import folder_of
from atlas_megatron.config import LAYERS, Layer, load
from atlas_megatron.estimate.traffic import Kind, RankPlace, bytes_sent
from atlas_megatron.hf import export, importing, names, registry_atlas
from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from atlas_megatron.hf.names import Name
from atlas_megatron.inference.reader import open_reader
from atlas_megatron.model.build import num_params
from atlas_megatron.train import main
from tests.support import processes, tiny_run, toy_atlas, toy_mixer
from tests.support.toy_mixer import AVERAGE

WORDS = ("recurrent.heads=2", "recurrent.head_dim=8")
NAMES = (
    Name("linear_in.weight", "linear_in.weight", "[heads x K, hidden]"),
    Name("linear_out.weight", "linear_out.weight", "[hidden, heads x K]"),
    Name("decay", "decay", "[heads, K]"),
)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """`T` of model.pattern, on both sides; afterwards nobody knows it again."""
    mixers.register("T", toy_mixer.MovingAverage, AVERAGE)
    names.register("T", toy_atlas.MovingAverage, NAMES)
    yield
    for entries in (LAYERS, mixers.MIXERS, registry_atlas.MIXERS):
        del entries["T"]
    del names.LAYERS[toy_atlas.MovingAverage]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write(tmp_path_factory.mktemp("toy"), "T-M-")


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """The directory of a run of six steps."""
    with tiny_run.a_world_that_is_left():
        assert main([str(config), *WORDS]) == 0
    return config.parent / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    return export.export(run, run.parent / "model")


def test_it_trains_and_resumes_as_if_it_had_not_stopped(config: Path, run: Path) -> None:
    whole = tiny_run.losses(run)
    assert len(whole) == 6 and whole[-1] < whole[0]
    stopped = config.parent / "stopped"
    shutil.copytree(run, stopped)
    shutil.rmtree(folder_of(stopped) / "step_00000006")
    with tiny_run.a_world_that_is_left():
        assert main([str(config), *WORDS, f"run.directory={stopped}"]) == 0
    assert tiny_run.losses(stopped) == whole


def test_the_dry_run_knows_it(config: Path, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config), "--dry-run", *WORDS, "parallel.tensor=2", "parallel.context=2"]) == 0
    said = capsys.readouterr().out
    assert "1 memory, 2 MLP, 1 moving average" in said and "context: state hand-off" in said
    built = sum(prod(value.shape) for value in load_file(exported / "model.safetensors").values())
    assert num_params(load(config, WORDS)) == built
    alone = load(config, [*WORDS, "model.pattern=T-", "parallel.context=2"])
    # Two sequences a micro-batch, two micro-batches, 16 numbers of float32.
    assert bytes_sent(alone, 2, RankPlace(), bf16=False)[Kind.STATE] == 2 * 2 * 16 * 4


def test_packed_documents_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config), "--dry-run", *WORDS, "data.packed=true"]) == 2
    assert "T (moving average) of model.pattern='T-M-' read over document borders" in capsys.readouterr().err


def test_the_export_gives_what_was_trained(run: Path, exported: Path) -> None:
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(3))
    with tiny_run.a_world_that_is_left():
        trained = open_reader(run).read(tokens)
    reader = open_reader(exported)
    pieces = [reader.read(piece) for piece in tokens.split([13, 1, 10], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), trained, rtol=1e-5, atol=1e-5)
    importing.import_folder(exported, run.parent / "again")
    assert export.read_source(run.parent / "again").rows == export.read_source(run).rows


@pytest.mark.parallel
def test_two_parts_of_a_sequence_train_as_one(config: Path) -> None:
    runs = {size: str(config.parent / f"{size} parts") for size in (1, 2)}
    for size, run in runs.items():
        words = [str(config), *WORDS, "model.pattern=T-", f"run.directory={run}", f"parallel.context={size}"]
        processes.run(size, toy_mixer.train, words)
    assert tiny_run.losses(Path(runs[1])) == pytest.approx(tiny_run.losses(Path(runs[2])), rel=1e-6)


def test_the_exported_folder_decodes_where_nothing_of_this_project_is_installed(exported: Path, tmp_path: Path) -> None:
    nothing = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    own = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    script = Path(tiny_run.__file__).with_name("load_without_package.py")
    words = [sys.executable, str(script), str(exported), str(tmp_path)]
    done = subprocess.run(words, env=nothing | own, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = torch.load(tmp_path / "said.pt")
    model = AtlasForCausalLM.from_pretrained(exported)
    prompt = torch.arange(2 * 21).view(2, 21) % 64
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, said["logits"])
        # Decoded token by token, from the state of the prompt.
        assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), said["continued"])
    assert "toy_atlas.py" in said["code"]
    # What it saves itself travels on.
    assert said["code"] == sorted(file.name for file in exported.glob("*.py"))


@pytest.mark.parametrize(
    ("symbol", "layer", "said"),
    [
        ("M", AVERAGE, "symbol='M' is taken by memory"),
        ("T", AVERAGE, "symbol='T' is taken by moving average"),
        ("|", AVERAGE, "is taken by a pipeline cut"),
        ("TT", AVERAGE, "is no single printable character"),
        ("U", Layer("other", ("train",)), "sections with heads are memory, attention, recurrent, delta"),
        ("U", Layer("other", exchanges_heads=True), "names no section that has them"),
    ],
)
def test_what_cannot_be_registered_is_told(symbol: str, layer: Layer, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mixers.register(symbol, toy_mixer.MovingAverage, layer)
    assert "U" not in LAYERS and mixers.MIXERS["M"] is not toy_mixer.MovingAverage


def test_every_symbol_has_its_class_on_both_sides() -> None:
    """But for experts, which exports refuse by name."""
    assert {*mixers.MIXERS, *mixers.CORES} == set(LAYERS) == {*registry_atlas.MIXERS, "E"}
    assert "E" not in registry_atlas.MIXERS
    assert set(registry_atlas.MIXERS.values()) == set(names.LAYERS)
