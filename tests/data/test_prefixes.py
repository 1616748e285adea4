"""The words of a blend: weights, prefixes with blanks and numbers, and files named in place of a prefix."""

from __future__ import annotations

from pathlib import Path

import pytest

from atlas_megatron.data.prefixes import blend, prefix_of


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("2024 crawl", "nan", "1e3 more data", "0.5 x.bin"):
        Path(folder).mkdir()
        for suffix in (".bin", ".idx"):
            Path(folder, f"train{suffix}").touch()


def test_what_lies_there_is_no_weight() -> None:
    assert blend(("2024 crawl/train", "1e3 more data/train")) == [
        (None, "2024 crawl/train"),
        (None, "1e3 more data/train"),
    ]
    assert blend(("2024 crawl/train.bin",)) == [(None, "2024 crawl/train")]
    assert blend((" 0.3 2024 crawl/train ", "2\tnan/train")) == [(0.3, "2024 crawl/train"), (2.0, "nan/train")]
    assert blend(("2024 elsewhere/train",)) == [(2024.0, "elsewhere/train")]
    assert blend(("my folder/train", "")) == [(None, "my folder/train"), (None, "")]
    for word in ("nan nan/train", "0 nan/train", "-1 2024 crawl/train", "inf x"):
        with pytest.raises(ValueError, match="greater than 0"):
            blend((word,))


def test_either_file_names_the_pair() -> None:
    for word in ("nan/train", "nan/train.bin", "nan/train.idx"):
        assert prefix_of(word) == "nan/train"
    for suffix in (".bin", ".idx"):
        Path(f"nan/train.bin{suffix}").touch()
    assert prefix_of("nan/train.bin") == "nan/train.bin"
