"""atlas-serve: what it becomes, and what it refuses before vLLM is started."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from atlas_megatron.serving.command import main
from tests.support import exported_models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: exported_models.exported(root / name, name) for name in ("M-", "F-", "C-")}


@pytest.fixture
def as_if_installed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """vLLM is here, and what the process would become is noted instead."""
    became: list[Any] = []
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "vllm" or found(name, *rest))
    monkeypatch.setattr(os, "execve", lambda *words: became.extend(words) or 0)
    return became


def test_it_becomes_vllm_with_the_folders_own_numbers(
    folders: dict[str, Path], tmp_path: Path, as_if_installed: list[Any]
) -> None:
    main([str(folders["M-"]), "--memories", str(tmp_path), "--max-length", "99", "--requests", "5", "--port", "7"])
    program, words, environment = as_if_installed
    assert program == sys.executable and words[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    given = dict(zip(words[3:-1:2], words[4:-1:2], strict=True))
    assert given["--model"] == str(folders["M-"])
    assert given["--dtype"] == "float32" and given["--served-model-name"] == "model" and given["--host"] == "127.0.0.1"
    assert (given["--max-model-len"], given["--max-num-seqs"], given["--port"]) == ("99", "5", "7")
    assert json.loads(given["--additional-config"]) == {"memories": str(tmp_path)}
    assert words[-1] == "--no-enable-prefix-caching" and environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_bad_input_is_a_line(
    folders: dict[str, Path], tmp_path: Path, as_if_installed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        ([str(tmp_path)], "is no exported model"),
        ([str(folders["M-"]), "--port", "0"], "--port 0 is out of range; give 1 to 65535"),
        ([str(folders["M-"]), "--max-length", "1"], "--max-length 1 is out of range"),
        ([str(folders["M-"]), "--requests", "0"], "--requests 0 is out of range"),
        ([str(folders["M-"]), "--memories", str(tmp_path / "none")], "is no folder; make it"),
        ([str(folders["C-"])], "cannot be served in batches: C layers"),
        ([str(folders["F-"]), "--max-length", "33"], "a layer of this model keeps every token up to the 32"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("atlas-serve: ") and error.count("\n") == 1
    assert not as_if_installed


def test_without_vllm_it_says_how_to_get_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert main([str(folders["M-"])]) == 2
    assert "vLLM is not installed beside this Python" in capsys.readouterr().err
