"""Tasks of atlas-eval, and a sample text, on the live model of a run: every so many steps, in any layout.

Examples, their order and their batches are those that `atlas-eval TASK RUN` has by default, so that a checkpoint of the
same step scores the same. Where no process holds the whole model, each gathers a copy of it for the while of an
evaluation. The processes share out the batches.
"""

from __future__ import annotations

import io
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.transformer import MegatronModule

from atlas_megatron.checkpoint.whole_model import WholeModel, is_split
from atlas_megatron.config import Config
from atlas_megatron.config.watching_checks import evaluated_lengths
from atlas_megatron.data.tokenizer import Tokenizer, load_tokenizer
from atlas_megatron.estimate.memory import footprint, fullest
from atlas_megatron.estimate.room import memory_of_a_process, said
from atlas_megatron.evaluate import perplexity, recall, symbolic, tasks
from atlas_megatron.evaluate.filler import TextFolder
from atlas_megatron.evaluate.reading import SEGMENT, unseen
from atlas_megatron.inference.reader import MegatronReader, Reader
from atlas_megatron.inference.speaker import Sampling, Speaker
from atlas_megatron.model.build import num_params, parameter_dtype
from atlas_megatron.parallel import world
from atlas_megatron.reports.results import Cell
from atlas_megatron.training.metrics import Record

# What atlas-eval takes where nothing else is asked for.
BATCH, SEED = 4, 0
TEMPERATURE, TOP_P = 0.8, 0.95  # of a sample text
ALONG = "along"  # perplexity's losses by position
OWN = ("perplexity", *tasks.TASKS, *symbolic.TASKS)


@dataclass(frozen=True)
class _Task:
    """compute: (reader, length, examples) -> a cell; score: (the cells of one length, it) -> measures by name.

    besides: further cells by name, each of the whole task.
    """

    lengths: tuple[int, ...]
    compute: Callable[[Reader, int, range], Cell]
    score: Callable[[list[Cell], int], dict[str, Any]]
    besides: dict[str, Callable[[Reader], Cell]]


class InTraining:
    """The evaluations and samples of a run; every process builds one and makes the same calls."""

    def __init__(self, config: Config) -> None:
        """Raises ValueError for a task that cannot be run here, by its name."""
        train = config.train
        self._config = config
        self._model: WholeModel | None = None
        self._tokenizer = load_tokenizer(config.data.tokenizer)
        if train.sample_prompt and not self._tokenizer.encode(train.sample_prompt):
            raise ValueError(f"train.sample_prompt={train.sample_prompt!r} holds no token; give another one")
        self._batches = [
            range(first, min(first + BATCH, train.evaluate_samples))
            for first in range(0, train.evaluate_samples, BATCH)
        ]
        self._tasks: dict[str, _Task] = {}
        if train.evaluate_every:
            self._tasks = {name: _task(name, config, self._tokenizer) for name in dict.fromkeys(train.evaluate_tasks)}

    def is_due(self, step: int) -> bool:
        return self._evaluates(step) or self._samples(step)

    def after(self, step: int, config: Config, chunks: list[MegatronModule]) -> tuple[Record, list[str]]:
        """evaluation: by task, length and measure, with the seconds that all took; sample: what the model wrote."""
        started = time.perf_counter()
        if self._model is None:
            self._model = WholeModel(config)
        reader = MegatronReader(self._model.of(chunks), self._model.config, self._tokenizer)
        record: Record = {}
        left_out: list[str] = []
        if self._evaluates(step):
            found, left_out = self._evaluated(reader)
            record |= {"evaluation": found, "evaluation_seconds": round(time.perf_counter() - started, 3)}
        if self._samples(step) and world.rank() == 0:
            record["sample"] = self._sample(reader)
        return record, left_out

    def _evaluates(self, step: int) -> bool:
        return _is_due(self._config.train.evaluate_every, step, self._config)

    def _samples(self, step: int) -> bool:
        return _is_due(self._config.train.sample_every, step, self._config)

    def _evaluated(self, reader: Reader) -> tuple[dict[str, Any], list[str]]:
        """Measures by task and length; what could not be measured, by name, with the reason."""
        own: dict[tuple[str, Any], Cell] = {}
        wrong: list[str] = []
        mine = list(self._work())[world.rank() :: world.size()]
        with unseen():
            for name, part, compute in mine:
                try:
                    own[name, part] = compute(reader)
                except ValueError as error:
                    wrong.append(f"{name} was left out: {error}")
        cells: dict[tuple[str, Any], Cell] = {}
        left_out: list[str] = []
        for others, refused in world.gathered((own, wrong)):
            cells |= others
            left_out += refused
        failed = {line.partition(" ")[0] for line in left_out}
        found = {name: self._scored(name, cells) for name in self._tasks if name not in failed}
        return found, list(dict.fromkeys(left_out))

    def _work(self) -> Iterator[tuple[str, Any, Callable[[Reader], Cell]]]:
        """Every cell, the longest lengths first: task, its place in it, and what computes it."""
        for name, task in self._tasks.items():
            for part, compute in task.besides.items():
                yield name, part, compute
            for length in reversed(task.lengths):
                for indices in self._batches:
                    yield name, (length, indices[0]), _computing(task, length, indices)

    def _scored(self, name: str, cells: dict[tuple[str, Any], Cell]) -> dict[str, Any]:
        task = self._tasks[name]
        found: dict[str, Any] = {}
        for length in task.lengths:
            found[str(length)] = task.score([cells[name, (length, rows[0])] for rows in self._batches], length)
        return found | {part: cells[name, part] for part in task.besides}

    def _sample(self, reader: Reader) -> str:
        train = self._config.train
        # One seed for all steps: what differs between two samples is the model.
        speaker = Speaker(reader, Sampling(TEMPERATURE, TOP_P, self._config.run.seed), SEGMENT)
        speaker.forget()
        if train.sample_prompt:
            speaker.read(io.StringIO(train.sample_prompt))
        else:
            speaker.begin()
        return train.sample_prompt + "".join(text for _, text in speaker.speak(train.sample_tokens))


def wrong_with_tasks(config: Config) -> list[str]:
    """What keeps a run from evaluating and sampling on the way, found before its first step on any machine."""
    try:
        _watcher_of(config)
    except (ValueError, OSError) as error:
        return [str(error)]
    return []


def watcher_of(config: Config, world_size: int) -> InTraining | None:
    """None where a configuration asks for neither evaluations nor samples.

    Raises ValueError as InTraining, and where a copy of the model would not fit on this machine.
    """
    watcher = _watcher_of(config)
    line, fits = copy_held(config, world_size, memory_of_a_process())
    if not fits:
        raise ValueError(line)
    return watcher


def _watcher_of(config: Config) -> InTraining | None:
    return InTraining(config) if config.train.evaluate_every or config.train.sample_every else None


def _is_due(every: int, step: int, config: Config) -> bool:
    return bool(every) and (step % every == 0 or step == config.train.steps)


def _computing(task: _Task, length: int, indices: range) -> Callable[[Reader], Cell]:
    return lambda reader: task.compute(reader, length, indices)


def _task(name: str, config: Config, tokenizer: Tokenizer) -> _Task:
    """Raises ValueError, with its name, for a task that needs what is not here."""
    base, lengths = tasks.base_of(name), evaluated_lengths(config)
    if base not in OWN or (base == "perplexity" and name != base):
        raise ValueError(_refusal(name))
    try:
        if base == "perplexity":
            return _perplexity(config, tokenizer, lengths)
        return (_recall if base in tasks.TASKS else _symbolic)(name, tokenizer, lengths)
    except ValueError as error:
        raise ValueError(f"train.evaluate_tasks: {name}: {error}") from error


def _refusal(name: str) -> str:
    if name == "chunks":
        why = "chunks reads a model anew at each chunk, which takes too long on the way"
    else:
        close = get_close_matches(name, OWN, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        why = f"{hint}{name!r} is none of atlas-eval's own tasks, which need neither a package nor a download"
    few = "perplexity, mqar, niah_single_1"
    return (
        f"train.evaluate_tasks: {why}; measure it on a checkpoint (atlas-eval {name} RUN), and take here for example "
        f"{few} (atlas-eval --help lists all)"
    )


def _perplexity(config: Config, tokenizer: Tokenizer, lengths: tuple[int, ...]) -> _Task:
    if not config.data.validation:
        raise ValueError("data.validation is empty; name a set, or leave perplexity out")
    text, longest = perplexity.of_validation(config, tokenizer), lengths[-1]
    starts = perplexity.places(text, longest, config.train.evaluate_samples)

    def compute(reader: Reader, length: int, indices: range) -> Cell:
        return perplexity.after_context(reader, text, [starts[index] for index in indices], length)

    def score(cells: list[Cell], length: int) -> dict[str, Any]:
        whole = perplexity.summary(cells)
        return {measure: whole[measure] for measure in ("loss", "bits_per_byte")}

    return _Task(
        (0, *lengths), compute, score, {ALONG: lambda reader: perplexity.along(reader, text, starts[:BATCH], longest)}
    )


def _symbolic(name: str, tokenizer: Tokenizer, lengths: tuple[int, ...]) -> _Task:
    task, longest = symbolic.find(name), symbolic.longest(name, tokenizer.vocab_size)
    if lengths[-1] > longest:
        raise ValueError(
            f"a vocabulary of {tokenizer.vocab_size:,} has ids for {longest:,} tokens, and {lengths[-1]:,} were asked "
            "for; set train.evaluate_lengths to shorter ones, or leave it out"
        )

    def compute(reader: Reader, length: int, indices: range) -> Cell:
        return symbolic.measured(task, reader, length, indices, SEED)

    return _Task(lengths, compute, lambda cells, length: {"accuracy": symbolic.accuracy(cells, length)[0]}, {})


def _recall(name: str, tokenizer: Tokenizer, lengths: tuple[int, ...]) -> _Task:
    kind = tasks.find(name)
    folder = TextFolder(Path(sysconfig.get_paths()["stdlib"]), tokenizer) if kind.needs_text else None
    made = recall.Recall(
        name,
        lambda length, index: tasks.make(name, tokenizer, length, index, SEED, folder),
        partial(tasks.score, name),
    )
    # A length without room for what is hidden is refused now.
    for length in lengths:
        made.make(length, 0)

    def compute(reader: Reader, length: int, indices: range) -> Cell:
        return recall.measured(made, reader, length, indices)

    def score(cells: list[Cell], length: int) -> dict[str, float]:
        return {metric: recall.points(cells, metric)[0].mean for metric in kind.metrics}

    return _Task(lengths, compute, score, {})


def copy_held(config: Config, world_size: int, memory: float) -> tuple[str, bool]:
    """What evaluations and samples hold on a device of so many bytes, and whether it fits; empty without a copy."""
    train = config.train
    if not (train.evaluate_every or train.sample_every) or not is_split(config):
        return "", True
    bf16 = parameter_dtype(config).itemsize == 2
    held = footprint(config, world_size, fullest(config, world_size, bf16=bf16), bf16=bf16)
    kept = held.parameters + held.gradients + held.optimizer
    copy = num_params(config) * parameter_dtype(config).itemsize
    line = (
        f"train.evaluate_every={train.evaluate_every} and sample_every={train.sample_every} read a copy of the whole "
        f"model, {said(copy)} beside {said(kept)} that a device trains, and it has {said(memory)}"
    )
    if kept + copy <= memory:
        return line, True
    return f"{line}; set both to 0, and run atlas-eval on a checkpoint", False
