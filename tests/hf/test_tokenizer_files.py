"""A tokenizer comes out of an export as a memory wants it: padded on the left, without another model's limits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from atlas_megatron.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from atlas_megatron.hf.tokenizer_files import copy_tokenizer, export_tokenizer

TEXT = "the memory of a small model reads and writes one token after another while it learns "
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT * 20], 280, folder)
    return folder


def changed(source: Path, target: Path, **config: object) -> Path:
    """The tokenizer with other keys in its tokenizer_config.json."""
    target.mkdir()
    (target / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    said = json.loads((source / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps(said | config))
    return target


def test_a_batch_is_padded_on_the_left_with_the_end_token(trained: Path, tmp_path: Path) -> None:
    found = export_tokenizer(trained, tmp_path, 280)
    end = load_tokenizer(trained).eod
    assert found is not None and (found.end, found.padding) == (end, end)
    words = AutoTokenizer.from_pretrained(tmp_path)
    batch = words(["the memory", TEXT], padding=True)
    assert batch["attention_mask"][0][0] == 0 and batch["input_ids"][0][0] == end
    assert words.decode(batch["input_ids"][1]) == TEXT
    # Where the state is of constant size no input is too long.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(words(TEXT * 200)["input_ids"]) > 2000 and words.model_max_length > 10**9


def test_a_padding_token_of_its_own_stays(trained: Path, tmp_path: Path) -> None:
    source = changed(trained, tmp_path / "own", pad_token={"content": "!", "special": True}, padding_side="right")
    found = export_tokenizer(source, tmp_path, 280)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert found is not None and found.padding == words.pad_token_id == load_tokenizer(trained).encode("!")[0]
    assert words.padding_side == "left" and words.eos_token == END_OF_TEXT


def test_what_tells_of_another_model_goes(trained: Path, tmp_path: Path) -> None:
    keys = {"model_max_length": 16, "auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    # A token that the vocabulary lacks would become one that the model has no row for.
    source = changed(trained, tmp_path / "other", unk_token="[UNK]", pad_token="[PAD]", **keys)
    file = source / "tokenizer.json"
    said = json.loads(file.read_text())
    said["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    said["model"]["dropout"] = 0.5
    file.write_text(json.dumps(said))
    export_tokenizer(source, tmp_path, 280)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert words.model_max_length > 10**9 and words.pad_token == END_OF_TEXT and len(words) == 280
    assert words(TEXT * 3)["input_ids"] == load_tokenizer(trained).encode(TEXT * 3)
    assert "auto_map" not in (tmp_path / "tokenizer_config.json").read_text()


def test_the_chat_template_goes_there_and_back(trained: Path, tmp_path: Path) -> None:
    source = changed(trained, tmp_path / "chat", additional_special_tokens=["<|endoftext|>"])
    (source / "chat_template.jinja").write_text(TEMPLATE)
    export_tokenizer(source, tmp_path, 280)
    words = AutoTokenizer.from_pretrained(tmp_path)
    said = words.apply_chat_template([{"role": "user", "content": "the memory"}], tokenize=False)
    assert said == "<user>the memory\n"
    back = tmp_path / "back"
    assert copy_tokenizer(tmp_path, back, 280) == load_tokenizer(trained).eod
    assert (back / "chat_template.jinja").read_text() == TEMPLATE
    assert load_tokenizer(back).fingerprint == load_tokenizer(trained).fingerprint


def test_a_folder_without_tokenizer_json_is_converted(trained: Path, tmp_path: Path) -> None:
    said = json.loads((trained / "tokenizer.json").read_text())["model"]
    source = tmp_path / "older"
    source.mkdir()
    (source / "vocab.json").write_text(json.dumps(said["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in said["merges"]]
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (source / "chat_template.jinja").write_text(TEMPLATE)
    found = export_tokenizer(source, tmp_path, 280)
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert found is not None and words.pad_token_id == found.padding and words.chat_template == TEMPLATE
    assert words(TEXT)["input_ids"] == load_tokenizer(source).encode(TEXT)


def test_no_tokenizer_and_one_too_large(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    assert export_tokenizer(tmp_path / "nothing", tmp_path, 280) is None
    with pytest.raises(ValueError, match="has 280 tokens, more than the model's vocab_size=200"):
        export_tokenizer(trained, tmp_path / "small", 200)
