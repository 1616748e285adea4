"""A Hugging Face folder from a stranger, or a damaged one: refused, the file named; no code of it runs."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from atlas_megatron.data.tokenizer import train_tokenizer
from atlas_megatron.hf import weights
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from atlas_megatron.inference.reader import HuggingFaceReader


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with its tokenizer, its code's name in its configuration, and its checksums."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    torch.manual_seed(0)
    sizes = {"heads": 1, "head_dim": 8}
    model = AtlasForCausalLM(
        AtlasConfig(
            pattern="M-", hidden_size=16, ffn_hidden_size=24, vocab_size=272, seq_length=32,
            memory=sizes | {"window": 4, "chunk": 8, "ns_period": 8, "gate_rank": 4}, attention=sizes,
        )
    )  # fmt: skip
    model.config.auto_map = {"AutoConfig": "code.AtlasConfig", "AutoModelForCausalLM": "code.AtlasForCausalLM"}
    model.save_pretrained(folder)
    (folder / "code.py").write_text("raise SystemExit('code of the folder ran')\n")
    train_tokenizer(["the memory learns at test time what the window of the text says " * 40], 272, folder)
    weights.note_sums(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(whole, tmp_path / "model")


def checked(folder: Path) -> None:
    weights.check(folder, weights.described_in(folder))


def changed(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_the_installed_code_reads_the_weights_unless_the_folders_is_asked_for(folder: Path) -> None:
    reader = HuggingFaceReader(folder)
    assert reader.read(torch.tensor([[1, 2, 3]])).shape == (1, 3, 272)
    with pytest.raises(SystemExit, match="code of the folder ran"):
        HuggingFaceReader(folder, trust_remote_code=True)


def test_weights_that_are_not_those_that_were_written_are_named(folder: Path) -> None:
    file = folder / weights.WEIGHTS
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was written"):
        HuggingFaceReader(folder)
    (folder / weights.SUMS).write_text("[]")
    with pytest.raises(ValueError, match=r"checksums\.json cannot be read"):
        checked(folder)
    # Weights that a user wrote anew have none.
    (folder / weights.SUMS).unlink()
    checked(folder)


@pytest.mark.parametrize("header", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_of_terabytes_is_refused(folder: Path, header: int) -> None:
    (folder / weights.WEIGHTS).write_bytes(struct.pack("<Q", header) + b"{}")
    with pytest.raises(ValueError, match=r"the weights in .* cannot be read"):
        checked(folder)


def test_a_tensor_that_is_larger_than_its_file_is_refused(folder: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1 << 30, 1 << 20], "data_offsets": [0, 1 << 52]}}).encode()
    (folder / weights.WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(ValueError, match=r"the weights in .* cannot be read"):
        checked(folder)


@pytest.mark.parametrize(
    "index",
    ["[]", "{}", "[" * 100_000, '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x"}}'],
    ids=range(6),
)
def test_an_index_of_another_form_is_refused(folder: Path, index: str) -> None:
    (folder / weights.INDEX).write_text(index)
    with pytest.raises(ValueError, match="restore its files"):
        checked(folder)


@pytest.mark.parametrize(
    "keys",
    [
        {"hidden_size": 1 << 40}, {"vocab_size": 1 << 60}, {"hidden_size": "large"}, {"hidden_size": -1},
        {"memory": []}, {"memory": {"heads": 1 << 40}}, {"pattern": 3}, {"pattern": "X"}, {"model_type": []},
        {"attention": {"persistent": 1_000_000_000, "heads": 1, "head_dim": 8}, "pattern": "*-"},
        {"hidden_size": None}, {"memory": {"chunk": 0}},
    ],
    ids=range(12),
)  # fmt: skip
def test_what_describes_another_model_is_refused_before_memory_is_asked_for(folder: Path, keys: dict[str, Any]) -> None:
    changed(folder, **keys)
    with pytest.raises(ValueError, match=r"does not hold what|does not describe an atlas model|of type"):
        checked(folder)


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, "\ufeff"], ids=range(5))
def test_a_description_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"is no Hugging Face folder|holds a model of type None"):
        checked(folder)


@pytest.mark.parametrize(
    "changed",
    [
        {}, {"memory": "{}"}, {"memory": '{"layers": [], "position": 0}'}, {"memory": "["}, {"model": "[" * 100_000},
        {"memory": '{"layers": [null, null], "position": {"tensor": "none"}}'},
        {"memory": '{"layers": [{"state": "Other", "fields": {}}, null], "position": 3}'},
        {"memory": '{"layers": [{"tensor": "x"}, {"tensor": "x"}], "position": 3}'},
        {"memory": '{"layers": [{"state": "AtlasState", "fields": {"x": 1}}, null], "position": 3}'},
    ],
    ids=range(9),
)  # fmt: skip
def test_a_memory_of_another_form_is_refused(folder: Path, tmp_path: Path, changed: dict[str, str]) -> None:
    reader = HuggingFaceReader(folder)
    reader.read(torch.tensor([[1, 2, 3]]))
    reader.save_memory(tmp_path / "kept")
    with safe_open(str(tmp_path / "kept"), "pt") as file:
        said = file.metadata()
    reader.load_memory(tmp_path / "kept")
    del said["sha256"]  # as files of before: it would tell before the form is looked at
    save_file({"x": torch.zeros(2, 2)}, str(tmp_path / "other"), said | changed)
    with pytest.raises(ValueError, match=str(tmp_path / "other")) as refused:
        reader.load_memory(tmp_path / "other")
    assert "\n" not in str(refused.value)
    (tmp_path / "other").write_bytes((tmp_path / "kept").read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        reader.load_memory(tmp_path / "other")
