"""tools/prepare_data.py: every input kind becomes the right tokens; bad input costs nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from atlas_megatron.data.corpus import Summary, split_of, standard_library
from atlas_megatron.data.prepare import Options, prepare
from atlas_megatron.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"document {i}: " + "the memory learns while it reads; " * (i % 5 + 1) + "é🙂\r\n" for i in range(40)]


def quiet(stage: str, size: int) -> None:
    assert stage in ("tokenizer", "tokens") and size >= 0


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    train_tokenizer(TEXTS, 280, tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def write_inputs(folder: Path, kind: str) -> list[str]:
    if kind == "txt":
        for i, text in enumerate(TEXTS):
            (folder / f"{i:02}.txt").write_bytes(text.encode())
        return [str(folder / "*.txt")]
    if kind == "jsonl":
        lines = [json.dumps({"body": text}) for text in TEXTS]
        (folder / "all.jsonl").write_text("\n".join(lines[:20]) + "\n\n" + "\n".join(lines[20:]))
        return [str(folder / "all.jsonl")]
    parquet.write_table(pyarrow.table({"body": TEXTS, "id": range(len(TEXTS))}), folder / "all.parquet")
    return [str(folder / "all.parquet")]


@pytest.mark.parametrize(("kind", "workers"), [("txt", 1), ("jsonl", 2), ("parquet", 1)])
def test_every_kind_of_input_gives_its_documents_back(
    tmp_path: Path, tokenizer: str, kind: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atlas_megatron.data.encoding.BATCH_CHARACTERS", 500)
    inputs = write_inputs(tmp_path, kind)
    options = Options(tokenizer=tokenizer, key="body", validation=0.3, workers=workers)
    summary, written = prepare(inputs, tmp_path / "out", options, quiet)
    assert written
    read = load_tokenizer(tokenizer)
    for name, split in summary.splits.items():
        expected = [text for text in TEXTS if split_of(text, 0.3) == name]
        dataset = IndexedDataset(str(tmp_path / "out" / name))  # kept: it unmaps its documents when it goes
        found = list(dataset)
        assert [read.decode(ids) for ids in found] == [text + END_OF_TEXT for text in expected]
        assert (split.documents, split.tokens) == (len(expected), sum(map(len, found)))
        assert split.bytes == sum(len(text.encode()) for text in expected)
    assert Summary.read(tmp_path / "out") == summary


def test_a_trained_tokenizer_lies_with_the_data(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, "txt")
    summary, _ = prepare(inputs, tmp_path / "out", Options(train_vocab=270, validation=0), quiet)
    read = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert (read.vocab_size, summary.vocab_size, read.eod) == (270, 270, 0)
    assert list(summary.splits) == ["train"] and not (tmp_path / "out" / "validation.bin").exists()
    assert read.decode(read.encode(TEXTS[3])) == TEXTS[3]


def test_text_that_spells_the_end_token_stays_text(tokenizer: str) -> None:
    read = load_tokenizer(tokenizer)
    ids = read.encode(f"a{END_OF_TEXT}b")
    assert read.eod not in ids and read.decode(ids) == f"a{END_OF_TEXT}b"


def test_an_end_token_named_in_the_folder_is_used(tokenizer: str) -> None:
    settings = Path(tokenizer) / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": {"content": "a"}}))
    read = load_tokenizer(tokenizer)
    assert [read.eod] == read.encode("a")
    settings.write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(ValueError, match="names no end-of-document token"):
        load_tokenizer(tokenizer)


def test_preparing_twice_does_nothing_and_new_input_replaces_where_asked(tmp_path: Path, tokenizer: str) -> None:
    inputs, out, options = write_inputs(tmp_path, "txt"), tmp_path / "out", Options(tokenizer=tokenizer, validation=0)
    prepare(inputs, out, options, quiet)
    first = (out / "train.bin").stat().st_mtime_ns
    assert prepare(inputs, out, options, quiet)[1] is False
    assert (out / "train.bin").stat().st_mtime_ns == first
    (tmp_path / "99.txt").write_text("one more")
    train_tokenizer(["another text, of other words"], 270, tmp_path / "other")
    for changed in (options, Options(tokenizer=str(tmp_path / "other"), validation=0), Options(tokenizer=tokenizer)):
        with pytest.raises(ValueError, match="out holds data that were prepared from other inputs .*--overwrite"):
            prepare(inputs, out, changed, quiet)
    assert (out / "train.bin").stat().st_mtime_ns == first
    # A copy of the tokenizer is the same one.
    shutil.copytree(tokenizer, tmp_path / "copy")
    (tmp_path / "99.txt").unlink()
    assert prepare(inputs, out, Options(tokenizer=str(tmp_path / "copy"), validation=0), quiet)[1] is False
    (tmp_path / "99.txt").write_text("one more")
    summary, written = prepare(inputs, out, options, quiet, overwrite=True)
    assert written and summary.splits["train"].documents == len(TEXTS) + 1
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "key.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (folder / "torn.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "half.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "number.jsonl").write_text('{"text": 3}\n')
    (folder / "not.parquet").write_bytes(b"PAR0")
    (folder / "small.txt").write_text("a small text")
    parquet.write_table(pyarrow.table({"body": ["a"]}), folder / "body.parquet")
    return {
        "missing": (["nowhere.txt"], "names no file"),
        "a folder": ([str(folder)], "names no file; name the files in it"),
        "empty": ([str(folder / "empty.txt")], "is empty"),
        "bytes": ([str(folder / "latin.txt")], "byte 3 (0xe9) is not UTF-8"),
        "no key": ([str(folder / "key.jsonl")], "key.jsonl, line 2: no key 'text' but txt"),
        "not JSON": ([str(folder / "torn.jsonl")], "torn.jsonl, line 2: not JSON"),
        "surrogate": ([str(folder / "half.jsonl")], "line 1: 'text' is not valid Unicode"),
        "no text": ([str(folder / "number.jsonl")], "line 1: 'text' holds int"),
        "no parquet": ([str(folder / "not.parquet")], "is not a Parquet file"),
        "no column": ([str(folder / "body.parquet")], "has no column 'text' but body"),
        "no validation": ([str(folder / "small.txt")], "split is empty: 1 documents"),
    }


def test_bad_input_is_one_line_and_costs_nothing(tmp_path: Path, tokenizer: str) -> None:
    inputs, out = write_inputs(tmp_path, "txt"), tmp_path / "out"
    before, _ = prepare(inputs, out, Options(tokenizer=tokenizer, validation=0), quiet)
    bad = tmp_path / "bad"
    bad.mkdir()
    for name, (words, expected) in bad_inputs(bad).items():
        with pytest.raises(ValueError) as caught:
            prepare(words, out, Options(tokenizer=tokenizer), quiet, overwrite=True)
        assert expected in str(caught.value), name
        assert "\n" not in str(caught.value), name
    assert Summary.read(out) == before
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_what_this_tool_did_not_make_is_not_replaced(tmp_path: Path, tokenizer: str) -> None:
    inputs = write_inputs(tmp_path, "txt")
    with pytest.raises(ValueError, match="was not made by this tool"):
        prepare(inputs, tmp_path, Options(tokenizer=tokenizer), quiet)
    prepare(inputs, tmp_path / "out", Options(train_vocab=270, validation=0), quiet)
    with pytest.raises(ValueError, match="which would be replaced"):
        prepare(inputs, tmp_path / "out", Options(tokenizer=str(tmp_path / "out" / "tokenizer")), quiet)


@pytest.mark.parametrize(("vocabulary", "words"), [(100, "too small; give at least 257"), (50000, "too big")])
def test_vocabularies_that_cannot_be(tmp_path: Path, vocabulary: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        options = Options(train_vocab=vocabulary, validation=0.3)
        prepare(write_inputs(tmp_path, "txt"), tmp_path / "out", options, quiet)
    assert not (tmp_path / "out").exists()


def test_a_broken_tokenizer_is_named(tmp_path: Path, tokenizer: str) -> None:
    (Path(tokenizer) / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tokenizer)
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")


def test_the_command_line(tmp_path: Path, tokenizer: str) -> None:
    inputs = write_inputs(tmp_path, "txt")
    done = run(*inputs, "--out", str(tmp_path / "out"), "--tokenizer", tokenizer, "--validation", "0.3")
    assert done.returncode == 0, done.stderr
    assert "validation:" in done.stdout and (tmp_path / "out" / "validation.idx").is_file()
    refused = run("nowhere.txt", "--out", str(tmp_path / "no"), "--tokenizer", tokenizer)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert refused.stderr.strip().splitlines()[-1].startswith("prepare_data: 'nowhere.txt' names no file")
    assert "examples:" in run("--help").stdout


def test_the_standard_library_is_a_corpus() -> None:
    files = standard_library(300_000)
    assert files == standard_library(300_000) and len(files) > 5
    assert sum(file.stat().st_size for file in files) <= 300_000
    assert not any("site-packages" in file.parts for file in files)


def test_a_file_of_any_name_is_read(tmp_path: Path, tokenizer: str) -> None:
    """Of bytes that are no UTF-8 too, as other systems write them."""
    names = [b"a\nb.txt", b"-c d.txt", b"\xff.txt", "\u00e9\U0001f642*.txt".encode()]
    for number, name in enumerate(names):
        (tmp_path / os.fsdecode(name)).write_text(TEXTS[number])
    inputs = [str(tmp_path / os.fsdecode(name)) for name in names]
    options = Options(tokenizer=tokenizer, validation=0)
    assert prepare(inputs, tmp_path / "out", options, quiet)[0].splits["train"].documents == len(names)
    assert prepare(inputs, tmp_path / "out", options, quiet)[1] is False


@pytest.mark.parametrize("vocabulary", [-5, 0, 256, 2**31, 10**20])
def test_a_vocabulary_that_cannot_be_is_refused(tmp_path: Path, vocabulary: int) -> None:
    with pytest.raises(ValueError, match=f"vocabulary of {vocabulary} is too"):
        train_tokenizer(TEXTS, vocabulary, tmp_path / "tokenizer")
