"""The official files, where a user has them: bAbI's stories (tasks_1-20_v1-2) and BABILong's rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from atlas_megatron.evaluate.stories import Story

ROWS = ("json", "jsonl", "parquet")  # forms of a file of rows


@dataclass(frozen=True)
class Row:
    """One of BABILong's: the context without a prompt, the question, the answer."""

    input: str
    question: str
    target: str


def read_stories(file: Path) -> list[Story]:
    """The stories of a bAbI file such as en-10k/qa1_single-supporting-fact_test.txt, one for each question in it.

    A line is `number sentence`, or `number question TAB answer TAB numbers of the supporting facts`; number 1 begins a
    story. A question's facts are those before it in its story, without earlier questions. Raises ValueError naming
    the line.
    """
    stories: list[Story] = []
    facts: dict[int, str] = {}
    last = 0
    for place, line in _lines(file):
        number, text = _numbered(place, line)
        if number == 1:
            facts = {}
        elif number <= last or not facts:
            raise ValueError(f"{place}: number {number} does not follow {last}; restore the file")
        last = number
        if "\t" in text:
            stories.append(_asked(place, text, facts))
        else:
            facts[number] = text
    if not stories:
        raise ValueError(f"{file} asks no question; give one of bAbI's, such as qa1_single-supporting-fact_test.txt")
    return stories


def _numbered(place: str, line: str) -> tuple[int, str]:
    number, _, text = line.strip().partition(" ")
    if not number.isdecimal() or not text.strip():
        raise ValueError(f"{place}: expected a number and a sentence, found {line!r}; restore the file")
    return int(number), text.strip()


def _asked(place: str, text: str, facts: dict[int, str]) -> Story:
    parts = [part.strip() for part in text.split("\t")]
    supporting = parts[2].split() if len(parts) == 3 else []
    if not supporting or not all(number.isdecimal() and int(number) in facts for number in supporting):
        raise ValueError(
            f"{place}: expected a question, its answer and the numbers of facts before it, parted by tabs, "
            f"found {text!r}; restore the file"
        )
    order = list(facts)
    at = tuple(sorted(order.index(int(number)) for number in supporting))
    return Story(tuple(facts.values()), parts[0], parts[1], at)


def rows_file(folder: Path, length: int) -> Path:
    """The file of a task's rows of this length: 4k.json for 4,096, 1M.json for 1,048,576; also .jsonl and .parquet.

    Raises ValueError where there is none.
    """
    name = f"{length >> 20}M" if length and length % 2**20 == 0 else f"{length >> 10}k"
    found = [folder / f"{name}.{kind}" for kind in ROWS if (folder / f"{name}.{kind}").is_file()]
    if length % 2**10 or not found:
        there = sorted({file.stem for kind in ROWS for file in folder.glob(f"*.{kind}")})
        raise ValueError(
            f"{folder} has no rows of {length:,} tokens; ask for --lengths that it has: {', '.join(there) or 'none'}"
        )
    return found[0]


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a file of BABILong's: a list in .json, one a line in .jsonl, or .parquet.

    Raises ValueError naming the row.
    """
    found = False
    for number, record in enumerate(_records(file), start=1):
        fields = [record.get(name) for name in ("input", "question", "target")] if isinstance(record, dict) else []
        if len(fields) != 3 or not all(isinstance(field, str) for field in fields):
            raise ValueError(f'{file}, row {number}: expected text under "input", "question" and "target"; restore it')
        found = True
        yield Row(str(fields[0]), *(str(field).strip() for field in fields[1:]))
    if not found:
        raise ValueError(f"{file} holds no row; give a file of BABILong's, such as data/qa1/4k.json")


def _records(file: Path) -> Iterator[object]:
    if file.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            with parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(1):
                    yield from batch.to_pylist()
        except ArrowException as error:
            raise ValueError(f"{file} is not a Parquet file ({error}); restore it") from error
    elif file.suffix == ".jsonl":
        for place, line in _lines(file):
            yield _json(line, place)
    else:
        rows = _json("\n".join(line for _, line in _lines(file)), str(file))
        if not isinstance(rows, list):
            raise ValueError(f"{file} holds no list but {type(rows).__name__}; give a file of BABILong's")
        yield from rows


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Each line that is not empty, after its place in words."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}, line {number}", line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason}); restore it") from error


def _json(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error}); restore the file") from error
