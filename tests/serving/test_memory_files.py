"""The memory files that a server offers: by name alone, of this model alone, whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from atlas_megatron.serving import memory_files
from atlas_megatron.serving.memory_files import MemoryFiles, weights_print
from tests.support import exported_models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_models.exported(tmp_path_factory.mktemp("exported"), "M-*-")


@pytest.fixture
def files(folder: Path, tmp_path: Path) -> MemoryFiles:
    model = AtlasForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, rows in (("book", 1), ("two", 2)):
            model(torch.arange(9).expand(rows, -1), use_cache=True).past_key_values.save_memory(tmp_path / name)
    return MemoryFiles(tmp_path, folder, model.config)


def test_the_print_of_a_folder_is_the_models(folder: Path) -> None:
    assert weights_print(folder) == AtlasForCausalLM.from_pretrained(folder).weights_print()


def test_a_file_is_named_and_read(files: MemoryFiles) -> None:
    files.check("book")
    assert files.load("book").position == 9


@pytest.mark.parametrize("name", ["none", "../book", "/etc/passwd", "", ".", 3, None])
def test_what_is_no_name_of_a_file_here_is_refused(files: MemoryFiles, name: object) -> None:
    (files.folder / "inside").mkdir()
    with pytest.raises(ValueError, match=r"is no file in this server's folder, which has \['book', 'two'\]"):
        files.check(name)


def test_several_texts_are_no_conversation(files: MemoryFiles) -> None:
    with pytest.raises(ValueError, match="memory 'two' is of 2 texts, and a conversation has one"):
        files.check("two")


def test_a_file_that_has_changed_is_looked_at_again(files: MemoryFiles) -> None:
    files.check("book")
    file = files.folder / "book"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match="book is damaged"):
        files.check("book")


def test_of_another_training_it_is_refused(files: MemoryFiles, folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    model = AtlasForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(other)
    with pytest.raises(ValueError, match="of this shape, with other weights"):
        MemoryFiles(files.folder, other, model.config).check("book")


def test_a_server_without_files_says_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_files, "_offered", None)
    with pytest.raises(ValueError, match="this server has none"):
        memory_files.offered()
    config = AtlasForCausalLM.from_pretrained(folder).config
    with pytest.raises(ValueError, match="missing is no folder"):
        memory_files.offer(tmp_path / "missing", folder, config)
    config.pattern = "F-F-"
    with pytest.raises(ValueError, match="grows with what it reads"):
        memory_files.offer(tmp_path, folder, config)
