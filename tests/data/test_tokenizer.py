"""Tokenizer folders as they are published: what they remember, what they declare, and in which files."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from atlas_megatron.data.declared_tokens import carried
from atlas_megatron.data.tokenizer import load_tokenizer, train_tokenizer

TEXT = "the memory of a model reads and writes one token after another"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train_tokenizer([TEXT] * 3, 280, folder)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy, to change."""
    return Path(shutil.copytree(trained, tmp_path / "tokenizer"))


def write(file: Path, said: object) -> None:
    file.write_text(json.dumps(said), encoding="utf-8-sig")  # with a byte order mark, as some editors leave it


def with_tokens(folder: Path, *tokens: str) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(list(tokens))
    backend.save(str(folder / "tokenizer.json"))


def test_what_a_tokenizer_remembers_does_not_act(trained: Path, folder: Path) -> None:
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=100)
    backend.model.dropout = 0.9
    backend.save(str(folder / "tokenizer.json"))
    changed, plain = load_tokenizer(folder), load_tokenizer(trained)
    assert changed.encode(TEXT) == plain.encode(TEXT) and changed.decode(changed.encode(TEXT)) == TEXT
    assert changed.fingerprint == plain.fingerprint


def test_the_fingerprint_tells_tokenizers_apart(trained: Path, folder: Path, tmp_path: Path) -> None:
    before = load_tokenizer(trained).fingerprint
    assert load_tokenizer(folder).fingerprint == before  # wherever it lies
    (folder / "tokenizer.json").write_text(json.dumps(json.loads((folder / "tokenizer.json").read_text()), indent=8))
    assert load_tokenizer(folder).fingerprint == before  # however it is written
    write(folder / "tokenizer_config.json", {"eos_token": "a"})
    assert load_tokenizer(folder).fingerprint != before
    train_tokenizer(["another text altogether, of other words"] * 3, 280, tmp_path / "other")
    assert load_tokenizer(tmp_path / "other").fingerprint != before


ENDS = {
    "tokenizer_config": (
        {"tokenizer_config.json": {"eos_token": {"content": "<|end|>", "__type": "AddedToken"}}},
        "<|end|>",
    ),
    "special_tokens_map": (
        {"special_tokens_map.json": {"eos_token": "<|end|>"}, "tokenizer_config.json": {}},
        "<|end|>",
    ),
    "both, as transformers reads them": (
        {"special_tokens_map.json": {"eos_token": "<|end|>"}, "tokenizer_config.json": {"eos_token": "<|turn|>"}},
        "<|end|>",
    ),
    "both, one with its tokens": (
        {
            "special_tokens_map.json": {"eos_token": "<|end|>"},
            "tokenizer_config.json": {"eos_token": "<|turn|>", "added_tokens_decoder": {}},
        },
        "<|turn|>",
    ),
    "generation_config": (
        {"generation_config.json": {"eos_token_id": [281, 280]}, "tokenizer_config.json": {}},
        "<|turn|>",
    ),
    "the model's": ({"config.json": {"eos_token_id": 280}, "tokenizer_config.json": {"eos_token": None}}, "<|end|>"),
    "none": ({"tokenizer_config.json": {}}, "<|endoftext|>"),
}


@pytest.mark.parametrize(("files", "end"), ENDS.values(), ids=ENDS)
def test_the_end_of_a_document_is_the_declared_one(folder: Path, files: dict[str, object], end: str) -> None:
    with_tokens(folder, "<|end|>", "<|turn|>")
    for name, said in files.items():
        write(folder / name, said)
    found = load_tokenizer(folder)
    assert found.decode([found.eod]) == end
    copy = folder.parent / "copy"
    copy.mkdir()
    for name, content in carried(folder).items():
        (copy / name).write_bytes(content)
    assert load_tokenizer(copy).fingerprint == found.fingerprint and not (copy / "config.json").exists()
    if "generation_config.json" not in files and "config.json" not in files and end != "<|endoftext|>":
        from transformers import AutoTokenizer

        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **files.get("tokenizer_config.json", {})})  # type: ignore[dict-item]
        )
        for name in files.keys() - {"tokenizer_config.json"}:
            (folder / name).write_text(json.dumps(files[name]))  # transformers takes no byte order mark
        assert found.eod == AutoTokenizer.from_pretrained(folder).eos_token_id


def test_tokens_that_are_kept_beside_the_vocabulary_belong_to_it(trained: Path, folder: Path) -> None:
    write(folder / "added_tokens.json", {"<|end|>": 280})
    write(folder / "special_tokens_map.json", {"eos_token": "<|end|>"})
    found = load_tokenizer(folder)
    assert (found.eod, found.vocab_size) == (280, 281)
    write(folder / "added_tokens.json", {"<|end|>": 900})
    with pytest.raises(ValueError, match="lists '<|end|>' as token 900"):
        load_tokenizer(folder)


def test_a_file_in_place_of_its_folder_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer.json' is a file; give the folder that holds it"):
        load_tokenizer(folder / "tokenizer.json")


WRONG = {
    "a number": ({"special_tokens_map.json": {"eos_token": 3}}, "names no end-of-document token"),
    "no token": (
        {"generation_config.json": {"eos_token_id": 99999}, "tokenizer_config.json": {}},
        "says eos_token_id 99999",
    ),
    "no object": ({"special_tokens_map.json": ["</s>"]}, "special_tokens_map.json is not a JSON object but list"),
    "no tokens": ({"tokenizer_config.json": {"added_tokens_decoder": {"x": 1}}}, "added_tokens_decoder holds 'x'"),
    "no id": ({"added_tokens.json": {"a": "b"}}, "gives 'a' the id 'b'"),
}


@pytest.mark.parametrize(("files", "said"), WRONG.values(), ids=WRONG)
def test_malformed_declarations_are_named(folder: Path, files: dict[str, object], said: str) -> None:
    for name, content in files.items():
        write(folder / name, content)
    with pytest.raises(ValueError, match=said):
        load_tokenizer(folder)


@pytest.mark.parametrize("declared", [{}, {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}])
def test_a_vocabulary_with_merges_is_read(trained: Path, tmp_path: Path, declared: dict[str, object]) -> None:
    said = json.loads((trained / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(said["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in said["merges"]))
    for name, content in declared.items():
        (tmp_path / name).write_text(json.dumps(content))
    found, same = load_tokenizer(tmp_path), load_tokenizer(trained)
    assert (found.encode(TEXT), found.eod, found.vocab_size) == (same.encode(TEXT), same.eod, same.vocab_size)
    assert found.decode(found.encode(TEXT)) == TEXT


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x07")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="tokenizer.model needs the sentencepiece package; install it with: pip"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="is not a tokenizer folder"):
        load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs the transformers package; install it with: pip install -e '.\[hf\]'"):
        load_tokenizer(tmp_path)
