"""A byte order mark, as files carry it that came over Windows, is no part of a text, a row, a story or a config."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from atlas_megatron import config
from atlas_megatron.commands import finetune
from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate import perplexity
from atlas_megatron.evaluate.babilong_files import Row, read_rows, read_stories
from atlas_megatron.evaluate.filler import TextFolder
from atlas_megatron.inference.speaker import Speaker

TEXT = "Mary went home. John is here."


def marked(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8-sig")
    return file


def test_texts_begin_with_their_first_word(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = marked(tmp_path / "book.txt", TEXT)
    assert perplexity.from_file(file, tokenizer, 1000).tokens.tolist() == tokenizer.encode(TEXT)
    blocks = [TextFolder(tmp_path, tokenizer)._block(0)]
    assert tokenizer.decode(np.concatenate([block.tokens for block in blocks if block])).strip() == TEXT


def test_a_text_may_be_compressed_or_documents_of_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + TEXT.encode()))
    packed = perplexity.from_file(tmp_path / "book.txt.gz", tokenizer, 1000)
    assert packed.tokens.tolist() == tokenizer.encode(TEXT)
    lines = marked(tmp_path / "docs.JSON", json.dumps({"text": TEXT}) + "\n" + json.dumps({"text": "b"}) + "\n")
    whole = [*tokenizer.encode(TEXT), tokenizer.eod, *tokenizer.encode("b"), tokenizer.eod]
    assert perplexity.from_file(lines, tokenizer, 1000).tokens.tolist() == whole
    assert perplexity.from_file(lines, tokenizer, 4).tokens.tolist() == whole[:4]
    lines.write_text('{"body": 3}')
    with pytest.raises(ValueError, match="no key 'text' but body"):
        perplexity.from_file(lines, tokenizer, 4)


@pytest.mark.parametrize("form", ["rows.json", "rows.jsonl"])
def test_rows_and_stories(tmp_path: Path, form: str) -> None:
    row = {"input": "a", "question": "b", "target": "c"}
    file = marked(tmp_path / form, json.dumps([row] if form.endswith("json") else row))
    assert list(read_rows(file)) == [Row(**row)]
    story = marked(tmp_path / "qa1.txt", "1 Mary went home.\n2 Where is Mary?\thome\t1\n")
    assert read_stories(story)[0].answer == "home"


def test_configs_and_options(tmp_path: Path) -> None:
    assert config.load(marked(tmp_path / "run.toml", "[train]\nsteps = 7\n")).train.steps == 7
    words = finetune._options_of(marked(tmp_path / "options.toml", 'prompt = "{input}"\nskip_bad = false\n'))
    assert words[:2] == ["--prompt={input}", "--no-skip-bad"]
    (tmp_path / "options.toml").write_bytes(b"\xff\xfea")
    with pytest.raises(ValueError, match="options.toml is not TOML"):
        finetune._options_of(tmp_path / "options.toml")


def test_a_prompt_of_a_file(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from atlas_megatron import generate
    from atlas_megatron.inference import reader

    read: list[str] = []

    def taken(self: Speaker, file: object) -> int:
        read.append(file.read())  # type: ignore[attr-defined]
        return 1

    monkeypatch.setattr(reader, "open_reader", lambda *_, **__: None)
    monkeypatch.setattr(Speaker, "__init__", lambda *_: None)
    monkeypatch.setattr(Speaker, "read", taken)
    monkeypatch.setattr(generate, "_speak", lambda *_: None)
    generate.main(["model", "--prompt-file", str(marked(tmp_path / "book.txt", TEXT))])
    (tmp_path / "book.gz").write_bytes(gzip.compress(TEXT.encode()))
    generate.main(["model", "--prompt-file", str(tmp_path / "book.gz")])
    assert read == [TEXT, TEXT], capsys.readouterr().err
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-16")
    assert generate.main(["model", "--prompt-file", str(tmp_path / "book.txt")]) == 2
    assert "book.txt is UTF-16 text; convert it" in capsys.readouterr().err
