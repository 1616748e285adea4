"""Examples of BABILong to fine-tune on, as the paper does, in BABILong's own fields."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.babilong import LABELS, Babilong, babilong
from atlas_megatron.evaluate.babilong_files import Row
from atlas_megatron.evaluate.filler import TextFolder
from atlas_megatron.files.scratch import file_beside

TRAINING = 1  # in the seeds, which are else those of `tasks.make`: no example of the evaluation is learned from


def training_rows(
    tasks: Sequence[str], tokenizer: Tokenizer, lengths: tuple[int, int], count: int, seed: int, folder: TextFolder
) -> Iterator[Row]:
    """`count` rows, the tasks (qa1 ... qa5) in turn; lengths are drawn evenly on a logarithmic scale.

    A length is of context and question, in tokens. Raises ValueError for unknown tasks and lengths that cannot be.
    """
    for task in tasks:
        if task not in LABELS:
            close = get_close_matches(task, LABELS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the tasks are {', '.join(LABELS)}"
            raise ValueError(f"there is no BABILong task {task!r}; {hint}")
    shortest, longest = lengths
    if not 0 < shortest <= longest or count < 1 or seed < 0:
        raise ValueError(
            f"{count} examples of {shortest} to {longest} tokens for seed {seed}: give at least one example, "
            "positive lengths in rising order, and a seed that is not negative"
        )
    for index in range(count):
        task = tasks[index % len(tasks)]
        place = (seed, index, zlib.crc32(f"babilong_{task}".encode()), TRAINING)
        length = int(np.exp(np.random.default_rng(place).uniform(np.log(shortest), np.log(longest + 1))))
        name = f"babilong_{task}/{index}"
        example = babilong(Babilong(task), name, tokenizer, min(length, longest), place, folder)
        (question,) = example.questions
        context = tokenizer.decode(np.concatenate(list(example.context())).tolist())
        # The last sentence is cut between tokens, maybe within a character.
        yield Row(context.rstrip("\ufffd").strip(), question.text.strip(), question.answers[0])


def write_rows(rows: Iterator[Row], file: Path, as_text: bool = False) -> int:
    """Write rows as JSON lines; the number of them. as_text: {"text": all of it} for tools/prepare_data.py.

    The file appears when it is whole. Raises ValueError for one that exists.
    """
    if file.exists():
        raise ValueError(f"{file} exists; remove it or give another name")
    file.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with file_beside(file) as unfinished, unfinished.open("w", encoding="utf-8") as lines:
        for row in rows:
            fields = {"text": f"{row.input}\n{row.question}\n{row.target}"} if as_text else asdict(row)
            lines.write(json.dumps(fields, ensure_ascii=False) + "\n")
            count += 1
    return count
