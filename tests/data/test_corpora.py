"""Corpora as they are published: compressed, marked, JSON of any form, partly bad, of one long text, or tokens."""

from __future__ import annotations

import bz2
import fcntl
import gzip
import io
import json
import lzma
import os
import signal
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from atlas_megatron.commands import prepare_data
from atlas_megatron.data import encoding, pieces
from atlas_megatron.data.corpus import Summary, documents
from atlas_megatron.data.prepare import Options, prepare
from atlas_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from atlas_megatron.files import scratch

TEXTS = [f"document {number}: naïve 🙂 memories read,\r\nand write" for number in range(30)]
RECORDS = [{"text": text, "meta": {"text": f"nested {n}", "parts": [{"text": text}]}} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
MARK = b"\xef\xbb\xbf"


def zstd(raw: bytes) -> bytes:
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as packed:
        packed.write(raw)
    return out.getvalue().to_pybytes()


def quiet(stage: str, size: int) -> None:
    assert size >= 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 300, folder)
    return str(folder)


FORMS: dict[str, bytes] = {
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": zstd(LINES[:500]) + zstd(LINES[500:]),  # of two frames, as parallel writers leave them
    "a.JSONL.BZ2": bz2.compress(LINES),
    "a.ndjson.xz": lzma.compress(LINES),
    "a.ndjson": LINES,
    "a.NDJSON": MARK + LINES,
    "a.json": LINES.replace(b"\n", b"\r\n"),
    "list.json": json.dumps(RECORDS).encode(),
    "list of lines.JSON": MARK + b"\n [" + b",\n".join(LINES.splitlines()) + b"]\n\n",
    "list.jsonl": json.dumps(RECORDS, indent=2, ensure_ascii=False).encode(),
    "objects.json": "\n\n".join(json.dumps(record, indent=2) for record in RECORDS).encode(),
    "packed without a name.jsonl": gzip.compress(LINES),
    "unpacked.jsonl.gz": LINES,
    "marked in the middle.jsonl": LINES.replace(b"\n", b"\n" + MARK, 1),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_json_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    found = list(documents(tmp_path / name, "text"))
    assert [document.text for document in found] == TEXTS
    assert sum(document.file_bytes for document in found) <= (tmp_path / name).stat().st_size


PLAIN: dict[str, Callable[[bytes], bytes]] = {
    "a.txt": bytes, "a.txt.gz": gzip.compress, "a.md.zst": zstd, "a.xz": lzma.compress, "a.txt.bz2": bz2.compress,
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("held", [1 << 20, 100])
def test_plain_text_loses_its_mark_and_nothing_else(
    tmp_path: Path, name: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atlas_megatron.data.corpus.HELD", held)
    text = "\n\r\n".join(TEXTS)
    (tmp_path / name).write_bytes(PLAIN[name](MARK + text.encode()))
    (document,) = documents(tmp_path / name, "text")
    assert document.text == document.text == text and document.size == len(text.encode())


def broken(folder: Path) -> dict[str, tuple[bytes, str]]:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as files:
        entry = tarfile.TarInfo("a.txt")
        entry.size = 5
        files.addfile(entry, io.BytesIO(b"hello"))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as packed:
        packed.writestr("a.txt", "hello")
    return {
        "torn.jsonl.gz": (gzip.compress(LINES)[:-20], "is gzip data that cannot be unpacked"),
        "torn.jsonl.zst": (zstd(LINES)[:-20], "is zstd data that cannot be unpacked"),
        "torn.txt.xz": (lzma.compress(LINES)[:-20], "is xz data that cannot be unpacked"),
        "wrong.txt.gz": (b"\x1f\x8bnothing that was packed", "is gzip data that cannot be unpacked"),
        "many.tar.gz": (archive.getvalue(), "is a tar archive; unpack it"),
        "many.zip": (zipped.getvalue(), "is a zip archive; unpack it"),
        "book.pdf": (b"%PDF-1.7\n", "is a PDF document"),
        "windows.txt": ("text".encode("utf-16"), "is UTF-16 text; convert it"),
        "latin.txt.gz": (gzip.compress(b"x" * 3000 + b"caf\xe9 x"), "byte 3003 (0xe9) is not UTF-8"),
        "half.txt": (b"abc\xe6\x97", "byte 3 (0xe6) is not UTF-8"),
        "raw.json": (b'{"name": "x", "version": 1}', "raw.json, line 1: no key 'text' but name, version"),
        "open.json": (b'[{"text": "a"}, {"text": "b"}', "open.json, record 3: not JSON"),
        "commas.json": (b'[{"text": "a"} {"text": "b"}]', "commas.json, record 2: not JSON (expecting ','"),
        "more.json": (b'[{"text": "a"}] x', "record 2: not JSON (something follows the list)"),
        "numbers.json": (b"[1, 2]", "numbers.json, record 1: expected an object, found int"),
        "words.json": (b"hello", "words.json, record 1: not JSON"),
        "deep.jsonl": (b'{"text": ' + b"[" * 100_000 + b"}\n", "deep.jsonl, line 1: cannot be read (maximum rec"),
        "deep.json": (b"[" + b'{"text": ' * 100_000, "deep.json, record 1: cannot be read (maximum recursion"),
        "long number.jsonl": (b'{"text": ' + b"1" * 5000 + b"}\n", "line 1: cannot be read (Exceeds the limit"),
        "latin.json": (b'[{"text": "a"}, {"text": "\xe9"}]', "latin.json, record 1: not UTF-8"),
    }


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name, (raw, said) in broken(tmp_path).items():
        file = tmp_path / name
        file.write_bytes(raw)
        with pytest.raises(ValueError) as caught:
            list(documents(file, "text"))
        assert said in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_a_key_may_lead_into_what_a_record_holds(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"meta.text": "by its name", "meta": {"text": "no"}}\n')
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    nested = [f"nested {number}" for number in range(30)]
    assert [found.text for found in documents(tmp_path / "a.jsonl", "meta.text")] == [*nested, "by its name"]
    assert [found.text for found in documents(tmp_path / "a.parquet", "meta.text")] == nested
    for file in ("a.jsonl", "a.parquet"):
        assert next(documents(tmp_path / file, "meta.parts.0.text")).text == TEXTS[0]
    for file, key in (("a.jsonl", "meta.title"), ("a.jsonl", "meta.parts.1.text"), ("a.parquet", "body.text")):
        with pytest.raises(ValueError, match=f"no (key|column) '{key}' but .*choose one with --key"):
            list(documents(tmp_path / file, key))


def test_bad_records_are_left_out_counted_and_named_where_asked(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [b'{"text": 3}', b'{"text": "torn', b'{"body": "x"}', b"[]", b'{"text": "\\ud800"}', b'{"text": "\xe9"}']
    lines = LINES.splitlines()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines[:10], *bad, *lines[10:]]))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    out = tmp_path / "out"
    words = [str(tmp_path / "a.jsonl"), str(tmp_path / "latin.txt"), "--out", str(out), "--tokenizer", tokenizer]
    words += ["--validation", "0.3", "--workers", "1"]
    assert prepare_data.main(words) == 2 and not out.exists()
    assert "a.jsonl, line 11: 'text' holds int" in capsys.readouterr().err
    assert prepare_data.main([*words, "--skip-bad"]) == 0
    said = capsys.readouterr().err
    assert "left out 7 bad records, namely:" in said and "latin.txt: byte 3" in said
    assert all(f"a.jsonl, line {number}: " in said for number in range(11, 17))
    summary = Summary.read(out)
    assert summary is not None and summary.skipped == 7
    assert sum(split.documents for split in summary.splits.values()) == 30


def test_a_long_document_is_encoded_in_pieces(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas_megatron.data.corpus.HELD", 500)
    monkeypatch.setattr(pieces, "BLOCK", 200)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 300)
    text, longest, whole = " ".join(TEXTS), 0, load_tokenizer(tokenizer)
    (tmp_path / "long.txt").write_bytes(text.encode())
    (tmp_path / "short.txt").write_text("a short text")
    encode = encoding._encode

    def watched(given: object, texts: list[str]) -> list[np.ndarray]:
        nonlocal longest
        longest = max(longest, *map(len, texts))
        return encode(whole, texts)

    monkeypatch.setattr(encoding, "_encode", watched)
    options = Options(tokenizer=tokenizer, validation=0)
    summary, _ = prepare([str(tmp_path / "*.txt")], tmp_path / "out", options, quiet)
    data = IndexedDataset(str(tmp_path / "out" / "train"))
    assert data[0].tolist() == [*whole.encode(text), whole.eod] and 0 < longest < 600 < len(text)
    assert data[1].tolist() == [*whole.encode("a short text"), whole.eod]
    assert len(data.document_indices) == 3 and summary.splits["train"].bytes == len(text.encode()) + 12


def test_an_empty_split_is_said_before_the_work(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    monkeypatch.setattr("atlas_megatron.data.prepare._encode", pytest.fail)
    monkeypatch.setattr("atlas_megatron.data.prepare.train_tokenizer", pytest.fail)
    for options in (Options(tokenizer=tokenizer, validation=1e-9), Options(train_vocab=300, validation=1e-9)):
        with pytest.raises(ValueError, match="the validation split is empty: 30 documents"):
            prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", options, quiet)


def test_what_killed_preparations_left_goes(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    out, options = tmp_path / "out", Options(tokenizer=tokenizer, validation=0)
    inputs = [str(tmp_path / "a.jsonl")]
    prepare(inputs, out, options, quiet)

    def left(name: str, marker: object) -> Path:
        folder = tmp_path / name
        (folder / "new").mkdir(parents=True)
        (folder / "new" / "train.bin").write_bytes(b"half")
        if marker is not None:
            (folder / scratch.MARKER).write_text(json.dumps(marker))
        return folder

    killed, users = left(".out.aaaaaaaa", {"target": "out"}), left(".out.bbbbbbbb", None)
    others, alive = left(".out.more.cccc", {"target": "out.more"}), left(".out.dddddddd", {"target": "out"})
    out.rename(killed / "old")  # it died between the two renames
    with (alive / scratch.MARKER).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (tmp_path / "b.txt").write_text("more")
        more = [*inputs, str(tmp_path / "b.txt")]
        with pytest.raises(ValueError, match="--overwrite"):  # the earlier data are back
            prepare(more, out, options, quiet)
        assert prepare(inputs, out, options, quiet)[1] is False
        summary, _ = prepare(more, out, options, quiet, overwrite=True)
        assert summary.splits["train"].documents == 31
    assert not killed.exists() and users.exists() and others.exists() and alive.exists()


def test_a_summary_of_another_form_is_named(tmp_path: Path) -> None:
    split = {"documents": 1, "tokens": 2, "bytes": 3}
    good = {"fingerprint": "a", "tokenizer": "b", "vocab_size": 4, "splits": {"train": split}}
    bad = [{"splits": {}}, good | {"tokenizer": 3}, good | {"splits": []}]
    bad += [good | {"splits": {"train": split | {"tokens": -1}}}]
    bad += [good | {"skipped": "many"}, good | {"unknown": 1}, good | {"splits": {"train": 3}}]
    for said in (good, *bad):
        (tmp_path / "data.json").write_text(json.dumps(said))
        if said is good:
            assert Summary.read(tmp_path) is not None
            continue
        with pytest.raises(ValueError, match=r"data\.json is broken .*prepare it again"):
            Summary.read(tmp_path)
    for others in ([1, 2], {"name": "a user's own"}):
        (tmp_path / "data.json").write_text(json.dumps(others))
        assert Summary.read(tmp_path) is None


def test_a_failure_puts_the_earlier_data_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "kept").touch()
    with pytest.raises(KeyboardInterrupt), scratch.built_beside(target) as built:
        assert (built.parent / scratch.MARKER).is_file()
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["out"] and (target / "kept").exists()
    with scratch.built_beside(target) as built:
        (built / "new one").touch()
    assert [file.name for file in target.iterdir()] == ["new one"] and len(list(tmp_path.iterdir())) == 1


def test_indexed_data_are_split_anew(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas_megatron.data.resplit.TOKENS_A_READ", 7)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    old, options = tmp_path / "old", Options(tokenizer=tokenizer, validation=0.3)
    prepare([str(tmp_path / "a.jsonl")], old, Options(tokenizer=tokenizer, validation=0), quiet)
    summary, _ = prepare([str(old / "train.bin")], tmp_path / "new", options, quiet)
    read, found = load_tokenizer(tokenizer), []
    for name, split in summary.splits.items():
        data = IndexedDataset(str(tmp_path / "new" / name))
        found += [read.decode(tokens[:-1]) for tokens in data]
        assert split.documents == len(data) > 3 and split.tokens == sum(map(len, data))
    assert sorted(found) == sorted(TEXTS)
    assert prepare([str(old / "train")], tmp_path / "new", options, quiet)[1] is False

    train_tokenizer(TEXTS, 290, tmp_path / "other")
    wrong = {
        "was made with another tokenizer": ([str(old / "train")], Options(tokenizer=str(tmp_path / "other"))),
        "is tokens already; give their tokenizer": ([str(old / "train")], Options(train_vocab=300)),
        "is text and .*train is indexed data": ([str(tmp_path / "a.jsonl"), str(old / "train")], options),
        "the validation split is empty: 30": ([str(old / "train")], Options(tokenizer=tokenizer, validation=1e-9)),
    }
    for said, (inputs, asked) in wrong.items():
        with pytest.raises(ValueError, match=said):
            prepare(inputs, tmp_path / "no", asked, quiet)
    assert not (tmp_path / "no").exists()


def test_a_tokenizer_that_had_to_be_converted_lies_with_the_data(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    said = json.loads((Path(tokenizer) / "tokenizer.json").read_text())["model"]
    (old / "vocab.json").write_text(json.dumps(said["vocab"]))
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in said["merges"]))
    (tmp_path / "a.jsonl").write_bytes(LINES)
    words = [str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--validation", "0", "--workers", "1"]
    assert prepare_data.main([*words, "--tokenizer", str(old)]) == 0
    assert "old has no tokenizer.json; converted, it is" in capsys.readouterr().out
    summary, kept = Summary.read(tmp_path / "out"), load_tokenizer(tmp_path / "out" / "tokenizer")
    assert summary is not None and summary.tokenizer == str(tmp_path / "out" / "tokenizer")
    assert summary.tokenizer_fingerprint == kept.fingerprint == load_tokenizer(old).fingerprint
    data = IndexedDataset(str(tmp_path / "out" / "train"))
    assert kept.decode(data[0][:-1]) == TEXTS[0] and data[0][-1] == kept.eod


def test_a_signal_to_end_removes_what_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    monkeypatch.setattr("atlas_megatron.data.prepare._encode", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    words = [str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--train-tokenizer", "280", "--validation", "0"]
    assert prepare_data.main(words) == 143 and signal.getsignal(signal.SIGTERM) == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
