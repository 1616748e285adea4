"""Examples to fine-tune on: BABILong's fields, right answers, lengths over the range, none of the evaluation's."""

import json
from pathlib import Path

import numpy as np
import pytest

from atlas_megatron.commands import make_babilong
from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.babilong_files import read_rows
from atlas_megatron.evaluate.filler import TextFolder
from atlas_megatron.evaluate.tasks import make
from tests.support import replay_facts as bystander


def write(out: Path, tokenizer: Tokenizer, texts: Path, *words: str) -> int:
    given = {"--lengths": ("300", "2000"), "--count": ("24",)}
    options = [option for name, values in given.items() if name not in words for option in (name, *values)]
    folders = ["--tokenizer", tokenizer.folder, "--filler", str(texts)]
    return make_babilong.main([*words, *options, *folders, "--out", str(out)])


def test_rows_are_written(tmp_path: Path, tokenizer: Tokenizer, texts: Path, folder: TextFolder) -> None:
    assert write(tmp_path / "rows.jsonl", tokenizer, texts, "qa1", "qa5") == 0
    rows = list(read_rows(tmp_path / "rows.jsonl"))
    assert len(rows) == 24
    for number, row in enumerate(rows):
        assert bystander.answer(bystander.facts_in(row.input), row.question) == row.target
        assert ("Where is" in row.question) == (number % 2 == 0)
    lengths = [len(tokenizer.encode(f"{row.input}\n{row.question}\n")) for row in rows]
    assert 290 < min(lengths) < 500 and 1300 < max(lengths) < 2010
    asked = {
        tokenizer.decode(np.concatenate(list(make("babilong_qa1", tokenizer, 2000, index, folder=folder).context())))
        for index in range(3)
    }
    told = {tuple(bystander.facts_in(text)) for text in asked}
    assert not told & {tuple(bystander.facts_in(row.input)) for row in rows}


def test_the_same_seed_writes_the_same(tmp_path: Path, tokenizer: Tokenizer, texts: Path) -> None:
    for name, seed in (("one", "3"), ("same", "3"), ("other", "4")):
        assert write(tmp_path / name, tokenizer, texts, "qa2", "--seed", seed, "--count", "4") == 0
    one, same, other = ((tmp_path / name).read_text() for name in ("one", "same", "other"))
    assert one == same != other


def test_texts_are_written(tmp_path: Path, tokenizer: Tokenizer, texts: Path) -> None:
    assert write(tmp_path / "texts.jsonl", tokenizer, texts, "qa4", "--as-text", "--count", "3") == 0
    for line in (tmp_path / "texts.jsonl").read_text().splitlines():
        context, question, answer = json.loads(line)["text"].rsplit("\n", 2)
        assert bystander.answer(bystander.facts_in(context), question) == answer


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("qa9",), "there is no BABILong task 'qa9'; did you mean 'qa"),
        (("qa1", "--lengths", "20", "30"), "its facts and its question alone take"),
        (("qa1", "--lengths", "300", "200"), "positive lengths in rising order"),
        (("qa1", "--count", "0"), "at least one example"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    tokenizer: Tokenizer,
    texts: Path,
    words: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert write(tmp_path / "rows.jsonl", tokenizer, texts, *words) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_file_is_not_written_over(
    tmp_path: Path, tokenizer: Tokenizer, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("precious")
    assert write(tmp_path / "rows.jsonl", tokenizer, texts, "qa1") == 2
    assert "exists; remove it or give another name" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_text() == "precious"
