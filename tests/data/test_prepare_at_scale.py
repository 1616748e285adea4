"""Preparing much text: Megatron's files byte for byte, going on after a kill, shards, and copies left out."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import shutil
import signal
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from atlas_megatron.commands import prepare_data
from atlas_megatron.data import indexed_files, prepare
from atlas_megatron.data.corpus import SplitSummary, Summary
from atlas_megatron.data.indexed_files import join
from atlas_megatron.data.merging import merge
from atlas_megatron.data.prepare import Options
from atlas_megatron.data.records import Skipped
from atlas_megatron.data.shards import Shard
from atlas_megatron.data.split_writer import SplitWriter
from atlas_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from atlas_megatron.files.resumable import LOCK, folder_beside

# What is killed is a fork that does nothing in threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
WORDS = "the memory learns while it reads and forgets what the window of its text no longer says".split()
DOCUMENTS = 60


def text(number: int) -> str:
    return f"{number}: " + " ".join(WORDS[(number * place) % len(WORDS)] for place in range(5, 9 + number % 7))


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    train_tokenizer([text(number) for number in range(DOCUMENTS)], 270, tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Six files of ten documents; some texts stand in several of them, one twice in the first."""
    for file in range(6):
        numbers = [*range(10 * file, 10 * file + 10), *([3, 3] if file == 0 else [3 * file, 7])]
        lines = "".join(json.dumps({"text": text(number)}) + "\n" for number in numbers)
        (tmp_path / f"part{file}.jsonl").write_text(lines)
    return [str(tmp_path / "part*.jsonl")]


def quiet(stage: str, size: int) -> None:
    assert stage in ("tokenizer", "tokens", "files") and size >= 0


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def fields(index: bytes) -> dict[str, Any]:
    """An .idx, field by field, as megatron.core.datasets.indexed_dataset reads it."""
    magic, version, code, sequences, borders = struct.unpack("<9sQBQQ", index[:34])
    found = {"magic": magic, "version": version, "dtype": code, "sequences": sequences, "borders": borders}
    at = 34
    lists = (("sizes", "<i4", sequences), ("pointers", "<i8", sequences), ("documents", "<i8", borders))
    for name, kind, count in lists:
        part = np.frombuffer(index, kind, count, at)
        found[name], at = part.tolist(), at + part.nbytes
    found["rest"] = index[at:]
    return found


@pytest.mark.parametrize("vocabulary", [300, 70_000])
def test_the_files_are_those_of_megatrons_builder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vocabulary: int
) -> None:
    """Of documents of one sequence and of several, for both widths of a token."""
    monkeypatch.setattr(indexed_files, "DOCUMENTS_A_READ", 5)
    generator = np.random.default_rng(0)
    (tmp_path / "ours").mkdir()
    writer = SplitWriter(tmp_path / "ours", vocabulary, 0)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocabulary))
    for number in range(23):
        lengths = generator.integers(1, 9, 1 + number % 3).tolist()
        tokens = generator.integers(0, vocabulary, sum(lengths))
        builder.add_document(torch.from_numpy(tokens), lengths)
        writer.add("train", tokens)
        writer.end("train", lengths, 7, bytes(32))
    builder.finalize(str(tmp_path / "theirs.idx"))
    writer.close()
    join([writer.parts["train"]], tmp_path / "train", writer.dtype, None, lambda size: None)
    ours, theirs = fields((tmp_path / "train.idx").read_bytes()), fields((tmp_path / "theirs.idx").read_bytes())
    for name in theirs:
        assert ours[name] == theirs[name], name
    assert theirs["dtype"] == (8 if vocabulary == 300 else 4) and theirs["borders"] == 24 and theirs["rest"] == b""
    assert (tmp_path / "train.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    assert (tmp_path / "train.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()


def preprocessed(files: Sequence[Path], tokenizer: str, prefix: Path) -> None:
    """What Megatron-LM's tools/preprocess_data.py --append-eod writes of lines of JSON."""
    read = load_tokenizer(tokenizer)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(read.vocab_size))
    for file in files:
        for line in file.read_text().splitlines():
            ids = [*read.encode(json.loads(line)["text"]), read.eod]
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_prepared_lines_are_what_preprocess_data_writes(
    tmp_path: Path, inputs: list[str], tokenizer: str, packed: str
) -> None:
    files = sorted(tmp_path.glob("part*.jsonl"))
    preprocessed(files, tokenizer, tmp_path / "theirs")
    for file in files if packed else ():
        target = Path(f"{file}{packed}")
        if packed == ".gz":
            target.write_bytes(gzip.compress(file.read_bytes()))
        else:
            with pyarrow.CompressedOutputStream(str(target), "zstd") as stream:
                stream.write(file.read_bytes())
    prepare.prepare([f"{inputs[0]}{packed}"], tmp_path / "out", Options(tokenizer=tokenizer, validation=0), quiet)
    for suffix in (".idx", ".bin"):
        ours, theirs = tmp_path / f"out/train{suffix}", tmp_path / f"theirs{suffix}"
        assert ours.read_bytes() == theirs.read_bytes(), suffix


def killed_after(saves: int, work: Callable[[], object]) -> None:
    """Do the work in a process that gets SIGKILL in the middle of a document after so many saved places."""
    process = os.fork()
    if process:
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        return
    try:
        done, save, add = 0, SplitWriter.save, SplitWriter.add

        def counted(writer: SplitWriter) -> dict[str, Any]:
            nonlocal done
            done += 1
            return save(writer)

        def torn(writer: SplitWriter, name: str, tokens: np.ndarray) -> None:
            add(writer, name, tokens)
            if done == saves:
                for files in writer._files.values():
                    for file in files:
                        file.flush()  # what was not saved may have reached the disk
                os.kill(os.getpid(), signal.SIGKILL)

        SplitWriter.save, SplitWriter.add = counted, torn  # type: ignore[method-assign]
        work()
    finally:
        os._exit(1)


@pytest.mark.parametrize("train", [False, True])
def test_after_a_kill_the_same_command_goes_on_to_the_same_bytes(
    tmp_path: Path, inputs: list[str], tokenizer: str, monkeypatch: pytest.MonkeyPatch, train: bool
) -> None:
    monkeypatch.setattr(prepare, "BYTES_A_SAVE", 200)
    bad = tmp_path / "part2.jsonl"
    bad.write_text(bad.read_text() + '{"text": 3}\n{"body": ""}\n')
    options = Options(
        tokenizer="" if train else tokenizer, train_vocab=280 if train else 0, validation=0.2, dedup=not train
    )
    whole, skipped = tmp_path / "whole", Skipped()
    prepare.prepare(inputs, whole, options, quiet, skipped)
    expected, out = content(whole), tmp_path / "out"
    for saves in (3, 2, 4):
        killed_after(saves, lambda: prepare.prepare(inputs, out, options, quiet, Skipped()))
        assert not out.exists() and folder_beside(out).is_dir()
    encoded, encode = [], prepare.encode_documents

    def watched(found: Any, *given: Any) -> Any:
        for piece, ids in encode(found, *given):
            encoded.append(piece.text)
            yield piece, ids

    monkeypatch.setattr(prepare, "encode_documents", watched)
    monkeypatch.setattr(prepare, "train_tokenizer", pytest.fail)
    again = Skipped()
    summary, written = prepare.prepare(inputs, out, options, quiet, again)
    assert written and 0 < len(encoded) < 50, "it goes on from what was saved, and does not begin anew"
    assert (again.count, again.named) == (skipped.count, skipped.named) == (2, skipped.named)
    found = content(out)
    for name in expected.keys() - {"data.json"}:
        assert found[name] == expected[name], name
    assert found["data.json"] == expected["data.json"].replace(str(whole).encode(), str(out).encode())
    assert found.keys() == expected.keys() and not folder_beside(out).exists()
    assert summary.duplicates == (0 if train else 12)
    if train:
        for file in (whole / "tokenizer").iterdir():
            assert file.read_bytes() == (out / "tokenizer" / file.name).read_bytes()


def test_what_was_saved_of_something_else_is_not_gone_on_from(
    tmp_path: Path, inputs: list[str], tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "BYTES_A_SAVE", 200)
    options, out = Options(tokenizer=tokenizer, validation=0), tmp_path / "out"
    killed_after(3, lambda: prepare.prepare(inputs, out, options, quiet))
    (tmp_path / "part0.jsonl").write_text(json.dumps({"text": "another text"}) + "\n")
    prepare.prepare(inputs, out, options, quiet)
    preprocessed(sorted(tmp_path.glob("part*.jsonl")), tokenizer, tmp_path / "theirs")
    assert (out / "train.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()
    # Files that hold less than was saved, as after a crash of the machine.
    (tmp_path / "part0.jsonl").write_text(json.dumps({"text": "a third one"}) + "\n")
    killed_after(3, lambda: prepare.prepare(inputs, out, options, quiet, overwrite=True))
    os.truncate(folder_beside(out) / "work" / "train.bin", 1)
    with pytest.raises(ValueError, match=r"train\.bin holds less than was saved; remove its folder and start again"):
        prepare.prepare(inputs, out, options, quiet, overwrite=True)


def test_a_bad_record_late_in_the_work_keeps_what_is_done(
    tmp_path: Path,
    inputs: list[str],
    tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(prepare, "BYTES_A_SAVE", 200)
    bad = tmp_path / "part5.jsonl"
    bad.write_text(bad.read_text() + "{\n")
    out = tmp_path / "out"
    words = [*inputs, "--out", str(out), "--tokenizer", tokenizer, "--validation", "0", "--workers", "1"]
    monkeypatch.setattr("atlas_megatron.data.encoding.BATCH_CHARACTERS", 100)
    assert prepare_data.main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-2] == f"{folder_beside(out)} keeps what is done; the same command goes on from there"
    assert said[-1].startswith(f"prepare_data: {bad}, line 13: not JSON")
    assert prepare_data.main([*words, "--skip-bad"]) == 0
    assert "left out 1 bad records" in capsys.readouterr().err and not folder_beside(out).exists()


def test_a_second_process_on_the_same_target_is_refused(tmp_path: Path, inputs: list[str], tokenizer: str) -> None:
    options, out = Options(tokenizer=tokenizer, validation=0), tmp_path / "out"
    beside = folder_beside(out)
    beside.mkdir()
    (beside / LOCK).touch()
    with (beside / LOCK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=f"another process prepares {out}; wait for it, or name another folder"):
            prepare.prepare(inputs, out, options, quiet)
    shutil.rmtree(beside)
    beside.mkdir()
    (beside / "somebody's").touch()
    with pytest.raises(ValueError, match="was not made by this tool; move it away"):
        prepare.prepare(inputs, out, options, quiet)
    assert (beside / "somebody's").exists()


@pytest.mark.parametrize("dedup", [False, True])
def test_shards_that_are_merged_are_the_whole(
    tmp_path: Path, inputs: list[str], tokenizer: str, monkeypatch: pytest.MonkeyPatch, dedup: bool
) -> None:
    monkeypatch.setattr(indexed_files, "DOCUMENTS_A_READ", 4)
    monkeypatch.setattr(indexed_files, "BUCKET_BYTES", 500)
    options = Options(tokenizer=tokenizer, validation=0.2, dedup=dedup)
    whole, out = tmp_path / "whole", tmp_path / "out"
    alone, _ = prepare.prepare(inputs, whole, options, quiet)
    for count in (1, 4, 6):
        for number in range(count):
            prepare.prepare(inputs, out, options, quiet, shard=Shard(number, count))
        assert not out.exists()
        merged, written = merge(inputs, out, options, quiet, count)
        assert written and merged == alone and content(out) == content(whole)
        assert merge(inputs, out, options, quiet, count)[1] is False
        shutil.rmtree(out)
    assert merged.duplicates == (12 if dedup else 0)
    assert sum(split.documents for split in merged.splits.values()) == DOCUMENTS + (0 if dedup else 12)


def test_copies_are_left_out_but_for_the_first_of_each(tmp_path: Path, inputs: list[str], tokenizer: str) -> None:
    options = Options(tokenizer=tokenizer, validation=0, dedup=True)
    summary, _ = prepare.prepare(inputs, tmp_path / "out", options, quiet)
    (tmp_path / "alone.jsonl").write_text(
        "".join(json.dumps({"text": text(number)}) + "\n" for number in range(DOCUMENTS))
    )
    preprocessed([tmp_path / "alone.jsonl"], tokenizer, tmp_path / "theirs")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out/train{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    texts = sum(len(text(number).encode()) for number in range(DOCUMENTS))
    assert summary.duplicates == 12 and summary.splits["train"].documents == DOCUMENTS
    assert summary.splits["train"].bytes == texts and Summary.read(tmp_path / "out") == summary


def test_shards_share_the_files_out_in_order_and_evenly(tmp_path: Path) -> None:
    files = []
    for number, size in enumerate((900, 10, 10, 10, 500, 400, 30)):
        files.append(tmp_path / f"{number}")
        files[-1].write_bytes(bytes(size))
    for count in range(1, 8):
        shares = [Shard(number, count).of(files) for number in range(count)]
        assert [file for share in shares for file in share] == files and all(shares)
    assert [len(Shard(number, 2).of(files)) for number in range(2)] == [4, 3]


def test_shards_that_cannot_be_are_refused(tmp_path: Path, inputs: list[str], tokenizer: str) -> None:
    options, out = Options(tokenizer=tokenizer, validation=0), tmp_path / "out"
    for word in ("4/4", "x", "1", "-1/4", "1/0"):
        with pytest.raises(ValueError, match="the first of four is 0/4, the last one 3/4"):
            Shard.parse(word)
    refused: list[tuple[str, Callable[[], object]]] = [
        ("6 files cannot be shared out to 7 shards", lambda: prepare.prepare(
            inputs, out, options, quiet, shard=Shard(0, 7))),
        ("shards need one tokenizer: train it first", lambda: prepare.prepare(
            inputs, out, Options(train_vocab=300), quiet, shard=Shard(0, 2))),
        ("0-of-2 is not there; prepare it with --shard 0/2", lambda: merge(inputs, out, options, quiet, 2)),
        ("-1 shards cannot be merged", lambda: merge(inputs, out, options, quiet, -1)),
    ]  # fmt: skip
    for said, work in refused:
        with pytest.raises(ValueError, match=said):
            work()
    for number in range(2):
        prepare.prepare(inputs, out, options, quiet, shard=Shard(number, 2))
    with pytest.raises(ValueError, match="0-of-2 holds data that were prepared from other inputs or with other sett"):
        merge(inputs, out, Options(tokenizer=tokenizer, validation=0, dedup=True), quiet, 2)
    os.truncate(tmp_path / "out.1-of-2" / "train.bin", 10)
    with pytest.raises(ValueError, match=r"out\.1-of-2/train\.bin is truncated; prepare that part again"):
        merge(inputs, out, options, quiet, 2)
    assert not out.exists()


def test_the_command_shards_and_merges(
    tmp_path: Path, inputs: list[str], tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*inputs, "--out", str(tmp_path / "out"), "--tokenizer", tokenizer, "--validation", "0", "--workers", "1"]
    words.append("--dedup")
    for number in range(2):
        assert prepare_data.main([*words, "--shard", f"{number}/2"]) == 0
        assert "the same words, with --merge 2 in the place of --shard" in capsys.readouterr().out
    assert prepare_data.main([*words, "--shard", "2/2"]) == 2
    assert "prepare_data: there is no shard 2/2" in capsys.readouterr().err
    assert prepare_data.main([*words, "--merge", "2"]) == 0
    said = capsys.readouterr().out
    assert "left out 12 copies of documents that are there already" in said and f"{tmp_path / 'out'} written" in said
    summary = Summary.read(tmp_path / "out")
    assert summary is not None and isinstance(summary.splits["train"], SplitSummary) and summary.duplicates == 12
