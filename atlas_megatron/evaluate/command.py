"""`atlas-eval TASK... MODEL`: measure a trained model, on this machine's data alone, going on where it was stopped."""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.options import add_trust_remote_code, lengths_of
from atlas_megatron.cli.version import add_version
from atlas_megatron.data.corpus import fingerprint
from atlas_megatron.files.scratch import refusal

if TYPE_CHECKING:
    from atlas_megatron.evaluate.perplexity import Text
    from atlas_megatron.inference.reader import Reader
    from atlas_megatron.reports.results import Results

EXAMPLES = """examples:
  atlas-eval perplexity runs/quickstart
  atlas-eval chunks runs/quickstart --chunks 1,16,64,256            # how far from its chunk a memory still works
  atlas-eval niah_single_1 vt babilong_qa1 runs/quickstart --lengths 1K,4K,16K --samples 10
  atlas-eval babilong_qa1 exported/atlas-340m --lengths 1M,10M --filler books --samples 2
  atlas-eval hellaswag piqa lambada_openai exported/atlas-340m      # lm-evaluation-harness, data in a local cache
  atlas-eval my_task runs/mine --tasks-folder my_tasks              # its own YAML format
  atlas-eval vt vt@2024-12-04 mqar@zoology runs/quickstart          # editions of a benchmark, named in the results
"""
# What a length is taken for where none is given.
LENGTHS = "1K,4K,16K"
SAMPLES = 16
CELL = "results"  # the one cell of an lm-evaluation-harness task
SUFFIX_HELP = "tokens of context and question, as 1000 or 4K or 10M (K is 1,024); 0: BABILong's stories alone"


@dataclass(frozen=True)
class Asked:
    """What the command line asks for, but for the tasks."""

    model: str
    lengths: tuple[int, ...]
    samples: int
    batch: int
    segment: int
    seed: int
    filler: Path
    text: str
    stories: Path | None
    chunks: tuple[int, ...]
    sequences: int | None  # --samples, where it is given
    out: Path
    tasks_folder: Path | None
    limit: int | None
    words: tuple[str, ...] = field(default=(), compare=False)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; an exit status. What went wrong is one line on standard error."""
    from atlas_megatron.cli.quiet import quieten

    parser = _parser()
    words = sys.argv[1:] if words is None else words

    def work() -> int:
        given = parser.parse_intermixed_args(words)
        quieten()
        return _run(given, tuple(words))

    remedy, left = "give a smaller --batch, --segment or --lengths", "the same command goes on from here"
    return command(parser.prog, work, on_memory=remedy, left=left)


def _parser() -> argparse.ArgumentParser:
    from atlas_megatron.evaluate.reading import SEGMENT

    parser = argparse.ArgumentParser(
        prog="atlas-eval",
        description="Measure a trained model: results as JSON with a picture a task; nothing is downloaded.",
        epilog=f"{EXAMPLES}\ntasks: {', '.join(_names())},\nother editions: {', '.join(_editions())},\n"
        "and every task of lm-evaluation-harness",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument("tasks", nargs="+", metavar="TASK", help="what to measure, see below")
    parser.add_argument("model", metavar="MODEL", help="a run's directory, or a folder exported for Hugging Face")
    add_trust_remote_code(parser)
    parser.add_argument("--lengths", default=LENGTHS, help=f"{SUFFIX_HELP}; default {LENGTHS}")
    parser.add_argument(
        "--samples", type=int, help=f"examples a length (default {SAMPLES}; chunks: all validation sequences of a run)"
    )
    parser.add_argument("--batch", type=int, default=4, help="examples read side by side (default 4)")
    parser.add_argument("--segment", type=int, default=SEGMENT, help=f"tokens read at once (default {SEGMENT})")
    parser.add_argument("--seed", type=int, default=0, help="of the examples (default 0)")
    parser.add_argument(
        "--filler", type=Path, metavar="FOLDER", default=Path(sysconfig.get_paths()["stdlib"]),
        help="text in which facts are hidden (default: the running Python's own library)",
    )  # fmt: skip
    parser.add_argument(
        "--text", default="", metavar="FILE|PREFIX",
        help="of perplexity and chunks: a text file or Megatron .bin/.idx data (default: the run's validation data)",
    )  # fmt: skip
    parser.add_argument(
        "--chunks", default="", metavar="1,16,...",
        help="tokens: of the task chunks (default: powers of two up to 512, and the trained chunk)",
    )  # fmt: skip
    parser.add_argument(
        "--stories", type=Path, metavar="FOLDER",
        help="for babilong_qa1 ...: bAbI's own files (en-10k/qa1_single-supporting-fact_test.txt), or BABILong's rows "
        "(qa1/4k.json), which are asked as they are; default: stories told here",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results (default: MODEL/evaluation)")
    parser.add_argument("--tasks-folder", type=Path, metavar="FOLDER", help="YAML files of lm-evaluation-harness tasks")
    parser.add_argument("--limit", type=int, help="questions of each lm-evaluation-harness task, for trying out")
    return parser


def _names() -> list[str]:
    """Every task of our own."""
    from atlas_megatron.evaluate import symbolic, tasks

    return ["perplexity", "chunks", *tasks.TASKS, *symbolic.TASKS]


def _editions() -> list[str]:
    """Names of our tasks in other editions than the default, or by a benchmark's own generator."""
    from atlas_megatron.evaluate import symbolic, tasks

    of_text = [f"{name}@{edition}" for name, task in tasks.TASKS.items() for edition in task.others]
    return [*of_text, *(f"{name}@{edition}" for name, task in symbolic.TASKS.items() for edition in task.others)]


def _run(given: argparse.Namespace, words: tuple[str, ...]) -> int:
    lengths = lengths_of(given.lengths)
    for name in ("samples", "batch", "segment", "limit"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise ValueError(f"--{name} {getattr(given, name)} must be at least 1")
    chosen = dict.fromkeys(given.tasks)
    own = [name for name in chosen if name.partition("@")[0] in _names()]
    if 0 in lengths and not all(name.startswith("babilong_") for name in chosen):
        raise ValueError(f"--lengths {given.lengths}: 0 tokens are of BABILong's tasks alone; leave 0 out")
    _check_editions(own)
    theirs = [name for name in chosen if name not in own]
    _check_theirs(theirs, given.tasks_folder)
    out = given.out or Path(given.model) / "evaluation"
    asked = Asked(
        given.model, lengths, given.samples or SAMPLES, given.batch, given.segment, given.seed, given.filler,
        given.text, given.stories, lengths_of(given.chunks, "--chunks") if given.chunks else (), given.samples, out,
        given.tasks_folder, given.limit, words,
    )  # fmt: skip
    from atlas_megatron.inference.reader import open_reader

    reader = open_reader(given.model, trust_remote_code=given.trust_remote_code)
    # Before hours of reading.
    if why := refusal(out):
        raise ValueError(f"results would lie in {out}, but {why}; give another --out")
    console = Console(soft_wrap=True)
    for name in own:
        console.print(_whole(_measure(name, reader, asked)))
    if theirs:
        console.print(_whole(_harness(theirs, reader, asked)))
    print(f"results and pictures in {out}")
    return 0


def _check_theirs(names: Sequence[str], folder: Path | None) -> None:
    """Raise ValueError for a name that looks like one of ours mistyped, or where lm-eval is missing."""
    if not names:
        return
    from atlas_megatron.evaluate import harness  # says what to install where it is missing

    for name in names:
        near = difflib.get_close_matches(name, _names(), n=1, cutoff=0.8)
        if near and not harness.knows(name, folder):
            raise ValueError(f"there is no task {name!r}; did you mean {near[0]!r}?")


def _check_editions(names: Sequence[str]) -> None:
    """Raise ValueError for an edition that one of our tasks does not have."""
    from atlas_megatron.evaluate import symbolic, tasks

    for name in names:
        base, at, _ = name.partition("@")
        if base in tasks.TASKS:
            tasks.find(name)
        elif base in symbolic.TASKS:
            symbolic.find(name)
        elif at:
            raise ValueError(f"there is no task {name!r}: {base} has one edition; write {base}")


def _whole(table: Table) -> Table:
    """On a narrow screen, names of metrics are broken and not cut off."""
    for column in table.columns:
        column.overflow = "fold"
    return table


def _measure(name: str, reader: Reader, asked: Asked) -> Table:
    from atlas_megatron.evaluate import tasks

    if name in ("perplexity", "chunks"):
        return _perplexity(reader, asked) if name == "perplexity" else _chunks(reader, asked)
    return _recall(name, reader, asked) if tasks.base_of(name) in tasks.TASKS else _symbolic(name, reader, asked)


def _results(name: str, reader: Reader, asked: Asked, **settings: Any) -> Results:
    """The task's file. `settings`: what its cells depend on; lengths and samples may grow."""
    from atlas_megatron.reports.results import Results

    at = reader.weights.checkpoint
    settings |= {"model": asked.model, "checkpoint": at.name if at else "", "weights": reader.weights.digest}
    settings |= {"seed": asked.seed}
    header = {"task": name, "command": shlex.join(["atlas-eval", *asked.words])}
    return Results(asked.out / f"{name}.json", header, settings)


def _batches(asked: Asked) -> list[range]:
    return [range(first, min(first + asked.batch, asked.samples)) for first in range(0, asked.samples, asked.batch)]


def _fill(results: Results, asked: Asked, compute: Callable[[int, range], dict[str, Any]]) -> None:
    """A cell for each length and batch that is not there yet, shortest first."""
    for length in asked.lengths:
        for indices in _batches(asked):
            name = f"{length} tokens, {indices[0]} to {indices[-1]}"
            said = f"{length:,} tokens, examples {indices[0] + 1} to {indices[-1] + 1} of {asked.samples}"
            results.cell(name, partial(compute, length, indices), said)


def _wanted(results: Results, asked: Asked) -> list[dict[str, Any]]:
    """The cells of the lengths and samples that were asked for."""
    names = [f"{length} tokens, {b[0]} to {b[-1]}" for length in asked.lengths for b in _batches(asked)]
    return [results.cells[name] for name in names]


def _recall(name: str, reader: Reader, asked: Asked) -> Table:
    from atlas_megatron.evaluate import pictures, recall, tasks
    from atlas_megatron.evaluate.filler import TextFolder

    kind = tasks.find(name)
    folder = TextFolder(asked.filler, reader.tokenizer) if kind.needs_text else None
    if folder and folder.left_out:
        print(f"{name}: left out of {asked.filler}, not being UTF-8: {len(folder.left_out)} files", file=sys.stderr)
    text = {"filler": str(asked.filler), "fingerprint": folder.fingerprint} if folder else {}
    told, stories = None, {"stories": "told here"} if tasks.base_of(name) in tasks.BABILONG else {}
    if asked.stories:
        told, files = tasks.official(name, asked.stories)
        stories = {"stories": str(asked.stories), "stories_fingerprint": fingerprint(files, "")}
    results = _results(name, reader, asked, source=kind.source, segment=asked.segment, **text, **stories)
    task = recall.Recall(
        name,
        lambda length, index: tasks.make(name, reader.tokenizer, length, index, asked.seed, folder, told),
        partial(tasks.score, name),
    )
    _fill(results, asked, lambda length, indices: recall.measured(task, reader, length, indices, asked.segment))
    cells = _wanted(results, asked)
    found = {metric: recall.points(cells, metric) for metric in kind.metrics}
    pictures.recall(results.path.with_suffix(".png"), f"{name}, {Path(asked.model).name}", found)
    table = Table("tokens", "questions", *found, "tokens/s", "peak MiB", title=f"{name} ({kind.source})")
    for row in zip(*found.values(), strict=True):
        means = (f"{p.mean:.3f}" + (f" ± {p.error:.3f}" if p.error is not None else "") for p in row)
        table.add_row(
            f"{row[0].length:,}", str(row[0].questions), *means, f"{row[0].tokens_per_second:,.0f}",
            f"{row[0].peak_bytes / 2**20:,.0f}",
        )  # fmt: skip
    return table


def _perplexity(reader: Reader, asked: Asked) -> Table:
    from atlas_megatron.evaluate import perplexity, pictures

    longest = asked.lengths[-1]
    text = _text(reader, asked, 4 * (longest + perplexity.TARGET))
    starts = perplexity.places(text, longest, asked.samples)
    of_text = {"text": text.name, "fingerprint": text.fingerprint}
    results = _results("perplexity", reader, asked, **of_text, longest=longest, samples=asked.samples)
    at = lambda indices: [starts[index] for index in indices]  # noqa: E731
    # Without context too, where the curve begins.
    asked = replace(asked, lengths=(0, *asked.lengths))
    _fill(results, asked, lambda n, indices: perplexity.after_context(reader, text, at(indices), n, asked.segment))
    first = _batches(asked)[0]
    results.cell("along", lambda: perplexity.along(reader, text, at(first), longest, asked.segment))
    cells = _wanted(results, asked)
    found = {n: perplexity.summary([cell for cell in cells if cell["context"] == n]) for n in asked.lengths}
    pictures.perplexity(
        results.path.with_suffix(".png"), f"{Path(asked.model).name}: what context is worth", found,
        results.cells["along"],
    )  # fmt: skip
    title = f"perplexity of the same tokens of {text.name}"
    table = Table("context", "nats per token", "bits per byte", "perplexity", title=title)
    for context, one in found.items():
        error = f" ± {one['error']:.3f}" if one["error"] is not None else ""
        table.add_row(
            f"{context:,}", f"{one['loss']:.4f}{error}", f"{one['bits_per_byte']:.4f}", f"{one['perplexity']:.2f}"
        )
    return table


def _chunks(reader: Reader, asked: Asked) -> Table:
    from atlas_megatron.config.chunks import chunk_of
    from atlas_megatron.evaluate import chunks, perplexity, pictures

    config = reader.config
    trained, length = chunk_of(config.memory), config.model.seq_length
    wanted = chunks.chosen(config, asked.chunks)
    if asked.text or not config.data.validation:
        read = chunks.of_text(_text(reader, asked, asked.samples * (length + 1)), length, asked.samples)
    else:
        read = chunks.of_validation(config, str(asked.out), asked.sequences)
    results = _results("chunks", reader, asked, text=read.name, fingerprint=read.fingerprint)
    batches = _batches(replace(asked, samples=len(read.tokens)))
    for chunk in wanted:
        at = reader.at_chunk(chunk)
        for rows in batches:
            compute = partial(chunks.measured, at, read.tokens[rows.start : rows.stop], asked.segment)
            results.cell(f"chunk {chunk}, {rows[0]} to {rows[-1]}", compute)
    cells = {chunk: [results.cells[f"chunk {chunk}, {r[0]} to {r[-1]}"] for r in batches] for chunk in wanted}
    found = {chunk: perplexity.summary(cells[chunk]) for chunk in wanted}
    title = f"{Path(asked.model).name}: one checkpoint, read with other chunks"
    pictures.chunks(results.path.with_suffix(".png"), title, found, trained)
    table = Table(
        "chunk", "nats per token", "bits per byte", "perplexity", "tokens/s",
        title=f"{len(read.tokens)} sequences of {length:,} tokens of {read.name}; trained with chunk {trained}",
    )  # fmt: skip
    for chunk, one in found.items():
        speed = sum(c["tokens"] for c in cells[chunk]) / sum(c["tokens"] / c["tokens_per_second"] for c in cells[chunk])
        row = (f"{one['loss']:.4f}", f"{one['bits_per_byte']:.4f}", f"{one['perplexity']:.2f}", f"{speed:,.0f}")
        table.add_row(f"{chunk}{' (trained)' if chunk == trained else ''}", *row)
    return table


def _text(reader: Reader, asked: Asked, most: int) -> Text:
    """What a loss is measured on; of a text file so many tokens at most.

    Raises ValueError where nothing was named and the model is no run with data.
    """
    from atlas_megatron.evaluate import perplexity

    if not asked.text:
        if not reader.config.data.validation:
            raise ValueError(f"{asked.model} names no validation data; give a text: --text FILE, or PREFIX of a .bin")
        return perplexity.of_validation(reader.config, reader.tokenizer)
    prefix = asked.text.removesuffix(".bin").removesuffix(".idx")
    if prefix == asked.text and Path(asked.text).is_file():
        return perplexity.from_file(Path(asked.text), reader.tokenizer, most)
    return perplexity.indexed(prefix, reader.tokenizer)


def _symbolic(name: str, reader: Reader, asked: Asked) -> Table:
    from atlas_megatron.evaluate import pictures, symbolic

    task = symbolic.find(name)
    results = _results(name, reader, asked, source=task.source)
    longest = symbolic.longest(name, reader.tokenizer.vocab_size)
    fits = tuple(length for length in asked.lengths if length <= longest)
    if fits != asked.lengths:
        said = f"{name}: a vocabulary of {reader.tokenizer.vocab_size:,} has ids for {longest:,} tokens"
        if not fits:
            raise ValueError(f"{said}; choose --lengths up to that")
        print(f"{said}: longer ones are left out", file=sys.stderr)
    asked = replace(asked, lengths=fits)
    seed, segment = asked.seed, asked.segment
    _fill(results, asked, lambda length, indices: symbolic.measured(task, reader, length, indices, seed, segment))
    found = {length: symbolic.accuracy(_wanted(results, asked), length) for length in asked.lengths}
    guessed = {length: symbolic.chance(name, length) for length in asked.lengths}
    pictures.shares(results.path.with_suffix(".png"), f"{name}, {Path(asked.model).name}", found, guessed)
    table = Table("tokens", "accuracy", "any value", title=f"{name} ({task.source})")
    for length, (mean, error) in found.items():
        table.add_row(f"{length:,}", f"{mean:.3f} ± {error:.3f}", f"{guessed[length]:.3f}")
    return table


def _harness(names: Sequence[str], reader: Reader, asked: Asked) -> Table:
    from atlas_megatron.evaluate import harness, pictures

    tasks = {}
    if asked.tasks_folder:
        definitions = sorted(file for file in asked.tasks_folder.rglob("*") if file.suffix in (".yaml", ".py"))
        tasks = {"tasks": str(asked.tasks_folder), "tasks_fingerprint": fingerprint(definitions, "")}
    files = {name: _results(name, reader, asked, limit=asked.limit, **tasks) for name in names}
    absent = [name for name, results in files.items() if CELL not in results.cells]
    if absent:
        # All in one: lm-eval looks at the machine at every call. Its answers are kept as they come, so that an
        # interrupted call goes on; the file is of these weights and this seed alone.
        asked.out.mkdir(parents=True, exist_ok=True)
        cache = asked.out / f"answers_{reader.weights.digest[:16]}_{asked.seed}"
        told = harness.run(
            absent, reader, include_path=asked.tasks_folder, limit=asked.limit, batch=asked.batch,
            segment=asked.segment, seed=asked.seed, cache=cache,
        )  # fmt: skip
        for name in absent:
            files[name].cell(CELL, partial(harness.of_task, told, name))
    table = Table("metric", "value", "± (standard error)", title="lm-evaluation-harness")
    for name, results in files.items():
        scores = harness.scores(results.cells[CELL])
        pictures.bars(results.path.with_suffix(".png"), f"{name}, {Path(asked.model).name}", scores)
        for metric, (value, error) in scores.items():
            table.add_row(metric, f"{value:.4f}", f"{error:.4f}" if error else "-")
    return table


if __name__ == "__main__":
    sys.exit(main())
