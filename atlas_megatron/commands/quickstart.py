"""Pretrain a small ATLAS on Python's own sources and show what came out: data, training, pictures, a sample."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.multiprocessing
from rich.console import Console
from rich.table import Table

from atlas_megatron import train
from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version, versions
from atlas_megatron.commands import prepare_data
from atlas_megatron.config import Config, load, uses
from atlas_megatron.config.shipped import CONFIGS
from atlas_megatron.data.corpus import standard_library
from atlas_megatron.files.scratch import write_whole
from atlas_megatron.reports.runs import plot_run
from atlas_megatron.resilience.stop_signals import SIGNALS

CONFIG = CONFIGS / "quickstart.toml"
CORPUS_BYTES = 10_000_000
HELD_OUT = 0.04  # share of files
PROMPT_TOKENS = 128
NEW_TOKENS = 128
SILENCED = "train.validate_silenced=true"  # validate without writes too: what the memories contribute


def prepare(config: Config) -> int:
    """Corpus, tokenizer and indexed data where `config` looks for them; an exit status."""
    # Here, not at the top: it takes seconds, which --help should not cost.
    from atlas_megatron.data.prepare import is_own

    files = [str(file) for file in standard_library(CORPUS_BYTES)]
    out = Path(config.data.train[0]).parent
    options = ["--train-tokenizer", str(config.model.vocab_size), "--validation", str(HELD_OUT)]
    if is_own(out, config.model.vocab_size):
        options.append("--overwrite")
    return prepare_data.main([*files, "--out", str(out), *options])


def layout(config: Config, devices: int) -> tuple[int, int]:
    """(processes, micro-batch): as many replicas as the devices hold and as share the global batch evenly."""
    parallel, whole = config.parallel, config.train.global_batch
    model = parallel.tensor * parallel.pipeline * parallel.context
    replicas = next(n for n in range(max(1, devices // model), 0, -1) if whole % n == 0)
    return model * replicas, min(config.train.micro_batch, whole // replicas)


def _devices() -> int:
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def train_side_by_side(words: list[str], count: int) -> int:
    """`atlas-train` with these words in `count` processes of this machine, as torchrun would start them; its status.

    Side by side two cores get far more done than two threads of one process, which wait for each other at every
    operation. A signal that asks to stop is handed on.
    """
    if count == 1:
        return train.main(words)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    context = torch.multiprocessing.start_processes(
        _train_one, (count, port, threads, words), nprocs=count, join=False, start_method="spawn"
    )
    assert context is not None

    def hand_on(number: int, _: object) -> None:
        for process in context.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    # Ctrl-C too: they save first, and each counts it once though the terminal has sent it to them as well.
    before = {number: signal.signal(number, hand_on) for number in (*SIGNALS, signal.SIGINT)}
    try:
        while not context.join():
            pass
    except torch.multiprocessing.ProcessExitedException as ended:
        return ended.exit_code if ended.exit_code > 0 else 3
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _train_one(rank: int, count: int, port: int, threads: int, words: list[str]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    torch.set_num_threads(threads)
    sys.exit(train.main(words))


def _write_sample(directory: Path) -> Path:
    """Continue the beginning of a held-out file with the trained model."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from atlas_megatron.checkpoint.checkpoint import load_model
    from atlas_megatron.data.tokenizer import load_tokenizer
    from atlas_megatron.inference.streaming import generate
    from atlas_megatron.parallel.device import device

    model, config = load_model(directory)
    tokenizer = load_tokenizer(config.data.tokenizer)
    held_out = IndexedDataset(config.data.validation[0])
    document = int(np.argmax(held_out.sequence_lengths >= PROMPT_TOKENS + NEW_TOKENS))
    prompt = held_out[document][:PROMPT_TOKENS].astype(np.int64)
    tokens = generate(model, torch.from_numpy(prompt)[None].to(device()), NEW_TOKENS, temperature=0.7, top_p=0.9)
    written = tokens[0].tolist()
    sample = directory / "sample.txt"
    sample.write_text(
        f"=== prompt: the first {PROMPT_TOKENS} tokens of a held-out file ===\n"
        f"{tokenizer.decode(written[:PROMPT_TOKENS])}\n"
        f"=== continuation: {NEW_TOKENS} tokens by the model (temperature 0.7, top-p 0.9) ===\n"
        f"{tokenizer.decode(written[PROMPT_TOKENS:])}\n",
        encoding="utf-8",
    )
    return sample


def summary(config: Config) -> dict[str, Any]:
    """What came out of a run that has ended, by name; also what each measurement of the memory layers was at last."""
    from atlas_megatron.model.build import num_params
    from atlas_megatron.reports.baselines import baselines
    from atlas_megatron.training.metrics import mean_measurements, read, silenced_difference

    records = read(config.run.directory)
    validated = next(record for record in reversed(records) if "validation_bits_per_byte" in record)
    against = baselines(config)
    tokens = config.train.global_batch * config.model.seq_length
    return {
        "command": "make quickstart",
        "versions": versions(),
        "parameters": num_params(config),
        "tokens": records[-1]["tokens"],
        "tokens_per_second": round(median(tokens / record["step_seconds"] for record in records)),
        "bits_per_byte": validated["validation_bits_per_byte"],
        "unigram_bits_per_byte": against.unigram,
        "gzip_bits_per_byte": against.gzip,
        # None for a model without a memory.
        "ablated_nats": silenced_difference(validated),
        "largest_gradient_norm": max(record["grad_norm"] for record in records),
        "memory_layers": mean_measurements(records),
    }


def _table(directory: str, found: dict[str, Any]) -> Table:
    table = Table("quickstart", "value", title=directory)
    table.columns[1].justify = "right"
    table.add_row("parameters", f"{found['parameters']:,}")
    table.add_row("tokens seen", f"{found['tokens']:,}")
    table.add_row("tokens/s, median", f"{found['tokens_per_second']:,}")
    table.add_row("validation bits per byte: this model", f"{found['bits_per_byte']:.3f}")
    table.add_row("  on the same bytes: unigram model of its tokens", f"{found['unigram_bits_per_byte']:.3f}")
    table.add_row("  on the same bytes: gzip -9", f"{found['gzip_bits_per_byte']:.3f}")
    if found["ablated_nats"] is not None:
        table.add_row("  with the memories ablated, change in nats a token", f"{found['ablated_nats']:+.4f}")
    for name, value in found["memory_layers"].items():
        if name.endswith(("_mean", "_norm")):
            table.add_row(f"{name.replace('_', ' ')} over the memory layers", f"{value:.4g}")
    return table


def main(words: Sequence[str] | None = None) -> int:
    """Run the quickstart; its exit status is that of what ended it."""
    work = lambda: _quickstart(_parser().parse_args(words).overrides)  # noqa: E731
    return command("quickstart", work, on_memory=train.ON_MEMORY, left="the same command goes on")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quickstart.py",
        description=__doc__,
        epilog="example: python tools/quickstart.py train.steps=50 run.directory=runs/short",
    )
    add_version(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"changes to {CONFIG.name}")
    return parser


def _quickstart(overrides: Sequence[str]) -> int:
    config = load(CONFIG, overrides)
    if not config.train.validate_every:
        raise ValueError("train.validate_every=0 leaves nothing to show at the end; give a number of steps")
    # Data of one's own is left alone: preparing would replace its folder.
    ours = config.data.train == load(CONFIG).data.train
    count, micro_batch = layout(config, _devices())
    failed = prepare(config) if ours else 0
    silenced = [SILENCED] if uses(config.model.pattern, "memory") else []
    words = [str(CONFIG), *silenced, *overrides, f"train.micro_batch={micro_batch}"]
    failed = failed or train_side_by_side(words, count)
    if failed:
        return failed
    from atlas_megatron.training.metrics import read

    if read(config.run.directory)[-1]["step"] < config.train.steps:
        return 0  # asked to stop; training has said so, and the same command goes on
    directory = Path(config.run.directory)
    pictures = plot_run(directory)
    sample = _write_sample(directory)
    found = summary(config)
    write_whole(directory / "summary.json", f"{json.dumps(found, indent=1)}\n")
    Console(soft_wrap=True).print(_table(config.run.directory, found))
    print(f"{sample}\n\n{sample.read_text(encoding='utf-8')}")
    print(f"pictures: {', '.join(picture.name for picture in pictures)} in {directory}")
    print(f"curves: tensorboard --logdir {directory}")
    return 0
