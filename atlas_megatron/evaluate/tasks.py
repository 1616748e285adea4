"""The long-context tasks by name: one example of any length, and its score.

A name such as vt is the newest edition of its benchmark, and vt@2024-12-04 another one; see `Task.others`.

folder = TextFolder("books", tokenizer)
example = make("niah_single_2", tokenizer, 1_000_000, index=0, seed=0, folder=folder)
score("niah_single_2", prediction, example.questions[0])
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate import metrics
from atlas_megatron.evaluate.babilong import LABELS, Babilong, babilong, exact, fits, from_row, hide, substring
from atlas_megatron.evaluate.babilong_files import Row, read_rows, read_stories, rows_file
from atlas_megatron.evaluate.babilong_prompts import EDITIONS
from atlas_megatron.evaluate.filler import TextFolder
from atlas_megatron.evaluate.haystack import Example, Question
from atlas_megatron.evaluate.ruler import parameters
from atlas_megatron.evaluate.ruler.common_words import common_words
from atlas_megatron.evaluate.ruler.frequent_words import frequent_words
from atlas_megatron.evaluate.ruler.niah import niah
from atlas_megatron.evaluate.ruler.tracking import tracking

# (name, tokenizer, length, seed, folder) -> Example
Maker = Callable[[str, Tokenizer, int, tuple[int, ...], TextFolder | None], Example]
Metric = Callable[[str, Question], float]


@dataclass(frozen=True)
class Task:
    """How one task is made and judged.

    official: the name of the metric that its benchmark reports. source: whose definition it is, which every result
    says. others: its other editions by what stands behind the @ of their names.
    """

    make: Maker
    metrics: dict[str, Metric]
    official: str
    needs_text: bool  # whether its needles lie in the text of a folder
    source: str
    others: Mapping[str, Task] = field(default_factory=dict)


def _on_answers(metric: Callable[[str, Sequence[str]], float]) -> Metric:
    return lambda prediction, question: metric(prediction, question.answers)


RULER_METRICS: dict[str, Metric] = {
    "string_match_all": _on_answers(metrics.string_match_all),
    "string_match_part": _on_answers(metrics.string_match_part),
}


RULER = parameters.NEWEST
WORDS = ", with words made up here"


def _makers(make: Callable[..., Example], tasks: Mapping[str, Any]) -> dict[str, Maker]:
    """Of the editions of a task."""
    return {edition: partial(make, task) for edition, task in tasks.items()}


def _ruler(
    make: Maker, needs_text: bool = False, earlier: Mapping[str, Maker] | None = None, ours: str = ""
) -> Task:
    """earlier: other editions. ours: what is not RULER's."""

    def of(make: Maker, edition: str) -> Task:
        return Task(make, RULER_METRICS, "string_match_all", needs_text, f"RULER {edition}{ours}")

    others = {edition: of(other, edition) for edition, other in (earlier or {}).items()}
    return replace(of(make, RULER), others=others)


def _each(make: Maker, needs_text: bool) -> Task:
    return replace(_ruler(make, needs_text), source="needles of RULER's, each asked for on its own (ours)")


def _babilong(task: Babilong) -> Task:
    judges: dict[str, Metric] = {"exact": partial(exact, task.task), "substring": substring}

    def of(task: Babilong) -> Task:
        return Task(partial(babilong, task), judges, "exact", needs_text=True, source=task.source)

    others = [edition for edition in EDITIONS if task.prompted and edition != task.edition]
    return replace(of(task), others={edition: of(replace(task, edition=edition)) for edition in others})


BABILONG = {
    **{f"babilong_{task}": Babilong(task) for task in LABELS},
    **{f"babilong_{task}_prompted": Babilong(task, prompted=True) for task in LABELS},
}
TASKS: dict[str, Task] = {
    **{
        name: _ruler(partial(niah, task), task.haystack == "essay", ours=WORDS if task.key == "words" else "")
        for name, task in parameters.NIAH.items()
    },
    **{name: _each(partial(niah, task), task.haystack == "essay") for name, task in parameters.NIAH_EACH.items()},
    **{
        name: _ruler(partial(tracking, task), earlier=_makers(tracking, parameters.TRACKING_EARLIER))
        for name, task in parameters.TRACKING.items()
    },
    **{
        name: _ruler(partial(common_words, task), False, _makers(common_words, parameters.COMMON_WORDS_EARLIER), WORDS)
        for name, task in parameters.COMMON_WORDS.items()
    },
    **{name: _ruler(partial(frequent_words, task)) for name, task in parameters.FREQUENT_WORDS.items()},
    **{name: _babilong(task) for name, task in BABILONG.items()},
}


def find(name: str) -> Task:
    """The task of that name, of the edition behind its @. Raises ValueError for an unknown one."""
    base, at, edition = name.partition("@")
    if base not in TASKS:
        close = get_close_matches(base, TASKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the tasks are {', '.join(TASKS)}"
        raise ValueError(f"there is no task {name!r}; {hint}")
    task = TASKS[base]
    if at and edition not in task.others:
        there = [base, *(f"{base}@{other}" for other in task.others)]
        raise ValueError(f"there is no task {name!r}; choose one of {', '.join(there)} ({base} is {task.source})")
    return task.others[edition] if at else task


def base_of(name: str) -> str:
    """The name without its edition."""
    return name.partition("@")[0]


def official(name: str, folder: Path) -> tuple[Maker, list[Path]]:
    """Asks the benchmark's own data instead of stories told here: the index-th of what the folder holds; its files.

    Either bAbI's files (en-10k/qa1_..._test.txt), whose stories are hidden in the text given, or BABILong's rows by
    length (data/qa1/4k.json), as they are. Raises ValueError for another task than BABILong's, and where neither is
    there.
    """
    base, _, edition = name.partition("@")
    if base not in BABILONG:
        raise ValueError(f"bAbI's files were given, and {name} tells none of its stories; leave them out")
    task = replace(BABILONG[base], edition=edition) if edition else BABILONG[base]
    if (folder / task.task).is_dir():
        return _rows(task, folder / task.task), sorted((folder / task.task).iterdir())
    files = sorted(folder.glob(f"{task.task}_*_test.txt"))
    if len(files) != 1:
        raise ValueError(
            f"{folder} holds {len(files)} files {task.task}_*_test.txt and no folder {task.task}; give the folder "
            "en-10k of bAbI, or BABILong's with its rows"
        )
    stories = read_stories(files[0])

    def made(name: str, tokenizer: Tokenizer, length: int, seed: tuple[int, ...], folder: TextFolder | None) -> Example:
        from_here = [stories[(seed[1] + place) % len(stories)] for place in range(len(stories))]
        story = next((story for story in from_here if fits(task, story, tokenizer, length)), from_here[0])
        return hide(task, name, story, tokenizer, length, seed, folder)

    return made, files


def _rows(task: Babilong, folder: Path) -> Maker:
    """BABILong's rows: in the folder a file for each length."""

    @lru_cache(maxsize=1)  # lengths come one after the other
    def rows_of(length: int) -> list[Row]:
        return list(read_rows(rows_file(folder, length)))

    def made(name: str, tokenizer: Tokenizer, length: int, seed: tuple[int, ...], _: TextFolder | None) -> Example:
        rows = rows_of(length)
        if seed[1] >= len(rows):
            raise ValueError(f"{folder} holds {len(rows)} rows of {length} tokens; ask for no more --samples")
        return from_row(task, name, rows[seed[1]], tokenizer)

    return made


def make(
    name: str,
    tokenizer: Tokenizer,
    length: int,
    index: int = 0,
    seed: int = 0,
    folder: TextFolder | None = None,
    maker: Maker | None = None,
) -> Example:
    """The index-th example of a task in `length` tokens, context and longest question together.

    Equal arguments make equal examples. A BABILong example of length 0 is the story alone (its "0k"). folder: text to
    hide needles in, encoded by the same tokenizer. maker: instead of the task's own, see `official`. Raises ValueError
    for an unknown task, a length without room for the facts, and a missing folder where the task needs one. Editions
    of a task differ in their words, not in what is drawn for them.
    """
    if index < 0 or seed < 0:
        raise ValueError(f"index {index} and seed {seed} of an example must not be negative")
    make_one = maker or find(name).make
    return make_one(f"{name}/{index}", tokenizer, length, (seed, index, zlib.crc32(base_of(name).encode())), folder)


def score(name: str, prediction: str, question: Question) -> dict[str, float]:
    """Every metric of the task, by name, from 0 to 1."""
    return {metric: judge(prediction, question) for metric, judge in find(name).metrics.items()}
