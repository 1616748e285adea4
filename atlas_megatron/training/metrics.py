"""What a run says of itself: one record a step, in a file, on the screen, in TensorBoard, at the end in a table.

A record is a dict of numbers with `step` and `loss`, and on some steps more keys: `layers`, the measurements of
every memory layer by its number, and `validation_loss` with `validation_bits_per_byte`, where asked for also
`validation_loss_silenced`, that with every memory held at its start weights; `slowest_rank`, its `slowest_seconds` and
the `median_seconds` of all; and once batches were passed over for NaN or inf, `skipped` and `returns`, counts so far.
`evaluation` holds measures by task and length, besides perplexity's losses by position (`along`), and took
`evaluation_seconds`; `sample` is a text that the model wrote. A step that was `profiled` took longer than others.
A layer's measurements are numbers, but for two kinds of lists: `*_histogram`, counts of a gate in equal bins, and
`*_spectrum`, QUANTILES of singular values.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from atlas_kernels.layer_start import ETA_HEADROOM, eta_start
from atlas_megatron.cli.version import versions
from atlas_megatron.config import Config
from atlas_megatron.config.batch_ramp import tokens_of
from atlas_megatron.estimate.machine import peak_flops
from atlas_megatron.files.scratch import write_whole
from atlas_megatron.training import weights_and_biases

Record = dict[str, Any]
METRICS = "metrics.jsonl"
TEXT = "log.txt"  # what the screen shows, with the time
HISTOGRAM, SPECTRUM = "_histogram", "_spectrum"
QUANTILES = ("min", "25%", "median", "75%", "max")
# Of the variation of an A or C layer's output, the part that its memory carries: below this it has collapsed.
LOW_MEMORY_SHARE = 0.05

def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    return nats_per_token / math.log(2) / bytes_per_token


def read(run_directory: str | Path) -> list[Record]:
    """Every record of a run, oldest first; raises ValueError where it has none."""
    path = Path(run_directory) / METRICS
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the directory of a run that has trained")
    records = _whole_records(path)
    if not records:
        raise ValueError(f"{path} holds no record; give the directory of a run that has trained")
    return records


def _whole_records(path: Path) -> list[Record]:
    """Raises ValueError, with the line's number, where one of them is no record."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        # A killed process can leave its last line unfinished.
        if not line.endswith(b"\n"):
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            record, why = None, str(error)
        else:
            why = "no object with a step and a loss"
        if not isinstance(record, dict) or not {"step", "loss"} <= record.keys() or type(record["step"]) is not int:
            raise ValueError(f"line {number} of {path} is no record of a step ({why}); remove that line")
        records.append(record)
    return records


class Speed:
    """Tokens a second, FLOP/s, MFU and time left, from the time each step took."""

    def __init__(self, config: Config, training_flops_per_token: float, world_size: int) -> None:
        self._config = config
        self._flops = training_flops_per_token
        self._world_size = world_size
        self._peak = peak_flops()
        self._recent: deque[float] = deque(maxlen=20)  # seconds a token
        self._most_memory = 0

    def after(self, step: int, seconds: float, tokens: int, trained: int, *, profiled: bool = False) -> Record:
        """The speed entries of this step's record; rates are those of one device.

        tokens: of this step, which took `seconds`; trained: of the run, up to it. profiled: it took longer than others
        do, and says nothing about the time left.
        """
        if not profiled or not self._recent:
            self._recent.append(seconds / tokens)
        rate = tokens / seconds / self._world_size
        achieved = rate * self._flops
        if torch.cuda.is_available():
            # An evaluation begins torch's own count anew.
            self._most_memory = max(self._most_memory, torch.cuda.max_memory_allocated())
        return {
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "tflops": achieved / 1e12,
            "mfu": achieved / self._peak if self._peak else None,
            "eta_seconds": tokens_of(self._config, self._config.train.steps - step, trained) * fmean(self._recent),
            "peak_memory_bytes": self._most_memory or None,
        } | ({"profiled": True} if profiled else {})


class RunLog:
    """Writes records: metrics.jsonl, TensorBoard, Weights & Biases where asked for, the screen and its lines in a file.

    bytes_per_token: of the training text; None where it is not known: the progress line then tells the perplexity.
    Raises ValueError where Weights & Biases cannot be used.
    """

    def __init__(self, config: Config, resumed_step: int, bytes_per_token: float | None = None) -> None:
        directory = Path(config.run.directory)
        self._config, self._bytes_per_token = config, bytes_per_token
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        # First what may be refused: nothing is written then.
        self._wandb = weights_and_biases.start(config, resumed_step) if config.log.wandb else None
        self._file = _open_after(directory / METRICS, resumed_step)
        self._text = (directory / TEXT).open("a", encoding="utf-8", errors="replace")
        self._note(f"{versions()}: begins after step {resumed_step} of {config.train.steps}")
        self._board = _tensorboard(directory, resumed_step) if config.log.tensorboard else None
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("", total=config.train.steps, completed=resumed_step)
            self._progress.start()

    def say(self, line: str) -> None:
        """Print one line, above the progress line where there is one, and note it."""
        self._console.print(line, markup=False)
        self._note(line)

    def _note(self, line: str) -> None:
        """Into the run's text log, with the time."""
        self._text.write(f"{datetime.now().astimezone().isoformat(sep=' ', timespec='seconds')}  {line}\n")
        self._text.flush()

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        numbers = dict(_flat(record))
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, record["step"])
            _add_histograms(self._board, record, self._config)
            if "sample" in record:
                # TensorBoard reads markdown: indented by four, a text stands as it is.
                self._board.add_text("sample", textwrap.indent(record["sample"], "    "), record["step"])
        if self._wandb:
            self._wandb.log(numbers, step=record["step"])
        self._show(record)

    def rewind(self, step: int) -> None:
        """Drop the records after a step: they will be taken again."""
        self._file.close()
        directory = Path(self._config.run.directory)
        self._file = _open_after(directory / METRICS, step)
        if self._board:
            self._board.close()
            self._board = _tensorboard(directory, step)

    def close(self) -> None:
        """Flush everything; the log takes no more records."""
        if self._progress:
            self._progress.stop()
        self._file.close()
        self._text.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()

    def _show(self, record: Record) -> None:
        step, last = record["step"], self._config.train.steps
        line = (
            f"step {step}/{last}  loss {record['loss']:.4f}  {self._in_other_words(record['loss'])}  "
            f"grad {record['grad_norm']:.3f}  lr {record['lr']:.2e}  "
            f"{record['tokens_per_second']:,.0f} tok/s  {timedelta(seconds=round(record['eta_seconds']))} left"
        )
        due = step % self._config.train.log_every == 0 or step == last
        if self._progress:
            self._progress.update(self._task, completed=step, description=line)
            if due:
                self._note(line)
        elif due:
            self.say(line)
        if "validation_loss" in record:
            bits = record["validation_bits_per_byte"]
            in_bits = f"  {bits:.4f} bits per byte" if bits is not None else ""
            contributes = silenced_difference(record)
            silenced = "" if contributes is None else f"  memory ablated: {contributes:+.2f} nats"
            self.say(f"step {step}/{last}  validation loss {record['validation_loss']:.4f}{in_bits}{silenced}")
        for task, by_length in record.get("evaluation", {}).items():
            self.say(f"step {step}/{last}  {task}: {'; '.join(_measures_of(by_length))}")
        if "sample" in record:
            self.say(f"step {step}/{last}  sample: {_printable(record['sample'])}")

    def _in_other_words(self, loss: float) -> str:
        """A loss as it can be compared with that of other tokenizers, where the text behind a token is known."""
        if self._bytes_per_token:
            return f"{bits_per_byte(loss, self._bytes_per_token):.3f} bits/byte"
        return f"perplexity {math.exp(min(loss, 80.0)):,.1f}"


def _measures_of(by_length: Mapping[str, Any]) -> Iterable[str]:
    """An evaluated task's measures at each length, but for losses by position."""
    for length, measures in by_length.items():
        if length.isdigit():
            yield f"{int(length):,} tokens " + ", ".join(f"{name} {value:.4f}" for name, value in measures.items())


def _printable(text: str) -> str:
    """A model may write what a terminal takes for orders."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _open_after(path: Path, resumed_step: int) -> Any:
    """Open the metrics to append to, without the records of steps that will be taken again."""
    kept = [r for r in _whole_records(path) if r["step"] <= resumed_step] if path.is_file() else []
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
    return path.open("a", encoding="utf-8")


def _tensorboard(directory: Path, resumed_step: int) -> Any:
    # Imported here: it takes seconds, and not every process of a run writes.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1)


def _add_histograms(board: Any, record: Record, config: Config) -> None:
    for number, layer in record.get("layers", {}).items():
        for name in (name for name in layer if name.endswith(HISTOGRAM)):
            counts = torch.tensor(layer[name], dtype=torch.float64)
            top = ETA_HEADROOM * eta_start(config.memory) if name == f"eta{HISTOGRAM}" else 1.0
            limits = torch.arange(1, len(counts) + 1, dtype=torch.float64) * (top / len(counts))
            centres = limits - top / len(counts) / 2
            board.add_histogram_raw(
                f"layers/{number}/{name.removesuffix(HISTOGRAM)}",
                min=0.0,
                max=top,
                num=int(counts.sum()),
                sum=(counts * centres).sum().item(),
                sum_squares=(counts * centres.square()).sum().item(),
                bucket_limits=limits.tolist(),
                bucket_counts=counts.tolist(),
                global_step=record["step"],
            )


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for name, value in record.items():
        # A sample text is no number.
        if isinstance(value, str):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            if name.endswith(SPECTRUM):
                yield from _flat(dict(zip(QUANTILES, value, strict=True)), f"{prefix}{name}/")
        elif value is not None and name != "step":
            yield f"{prefix}{name}", value


def silenced_difference(record: Record) -> float | None:
    """How far the validation loss rises, in nats a token, when no memory learns; None where it was not tried."""
    if "validation_loss_silenced" not in record:
        return None
    return record["validation_loss_silenced"] - record["validation_loss"]


def speeds_of(records: list[Record]) -> list[float]:
    """Tokens a second of the steps that say it, but for profiled ones, unless there are no others."""
    having = [record for record in records if "tokens_per_second" in record]
    undisturbed = [record for record in having if not record.get("profiled")]
    return [record["tokens_per_second"] for record in undisturbed or having]


def mean_measurements(records: list[Record]) -> dict[str, float]:
    """Each measurement of the last measured step that is a number, averaged over the memory layers."""
    layers = next((list(r["layers"].values()) for r in reversed(records) if r.get("layers")), [])
    names = dict.fromkeys(name for layer in layers for name, value in layer.items() if not isinstance(value, list))
    return {name: fmean(layer[name] for layer in layers if name in layer) for name in names}


def summary_table(records: list[Record], parameters: int) -> Table:
    """What came out of a run, for its last lines."""
    table = Table("measure", "value", title="run summary")
    table.columns[1].justify = "right"
    table.add_row("parameters", f"{parameters:,}")
    table.add_row("tokens seen", f"{records[-1].get('tokens', 0):,}")
    # A record that somebody shortened has none.
    speeds = speeds_of(records)
    table.add_row("tokens/s, median, a device", f"{median(speeds):,.0f}" if speeds else "unknown")
    table.add_row("training loss, nats a token", f"{records[-1]['loss']:.4f}")
    validated = [r for r in records if "validation_loss" in r]
    if validated:
        table.add_row("validation loss, nats a token", f"{validated[-1]['validation_loss']:.4f}")
        bits = validated[-1]["validation_bits_per_byte"]
        table.add_row("validation bits per byte", "unknown" if bits is None else f"{bits:.4f}")
        contributes = silenced_difference(validated[-1])
        if contributes is not None:
            table.add_row("validation loss with the memory ablated, change in nats", f"{contributes:+.4f}")
    for name, value in mean_measurements(records).items():
        table.add_row(f"{name.replace('_', ' ')}, mean of layers", f"{value:.4g}")
    return table
