"""Time the quickstart's trainer with each mixer, at several sequence lengths: tokens a second of whole steps.

Every contender is configs/quickstart.toml with other mixers, its MLPs as wide as makes all equal in parameters. A step
has the same number of tokens at every length. Contenders train in turn, round after round, each in a process of its
own; figures are medians over the steps of all rounds but each run's first two. Run `make quickstart` once before, for
its data.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from atlas_megatron.config import load
from atlas_megatron.training.metrics import read
from benchmarks.report import made_by, write
from experiments.shared.protocol import Contender, Protocol, parameters

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "configs" / "quickstart.toml"
LENGTHS = (512, 2048, 8192)
TOKENS = 8192  # of a step
STEPS, DROPPED = 5, 2  # of a run; and how many of them only warm up
CONTENDERS = {
    "ATLAS": Contender(),
    "OmegaNet": Contender(("memory.preset=omeganet",)),
    "Gated DeltaNet": Contender(("model.pattern=G-*-G-", "delta.head_dim=32")),
    "sliding window": Contender(("model.pattern=*-*-*-",)),
    "full attention": Contender(("model.pattern=F-F-F-",)),
}


def words_of(name: str, length: int) -> list[str]:
    """What a contender changes of the base at this length."""
    batch = TOKENS // length
    shape = (f"model.seq_length={length}", f"train.global_batch={batch}", f"train.micro_batch={min(8, batch)}")
    protocol = Protocol(BASE, shape, STEPS, (), (1,), Path())
    first = next(iter(CONTENDERS.values()))
    untimed = ("train.validate_every=0", "train.stats_every=1000000", "log.tensorboard=false")
    return [*protocol.words_of(CONTENDERS[name], first, STEPS, 1, None), *untimed]


def timed(name: str, length: int) -> list[float]:
    """Tokens a second of the counted steps of one run. Raises RuntimeError with its last line where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        words = [str(BASE), *words_of(name, length), f"run.directory={folder}/run"]
        done = subprocess.run(
            [sys.executable, "-m", "atlas_megatron.train", *words], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
            raise RuntimeError(f"{name} at {length} tokens: {said}")
        return [record["tokens_per_second"] for record in read(Path(folder) / "run")[DROPPED:]]


def measure(rounds: int, lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Median tokens a second of every contender, by length."""
    speeds: dict[str, dict[str, list[float]]] = {name: {str(n): [] for n in lengths} for name in CONTENDERS}
    for round_ in range(1, rounds + 1):
        for length in lengths:
            for name in CONTENDERS:
                print(f"round {round_}/{rounds}: {name}, {length} tokens", flush=True)
                speeds[name][str(length)] += timed(name, length)
    return {name: {n: statistics.median(found) for n, found in by.items()} for name, by in speeds.items()}


def main(words: Sequence[str] | None = None) -> int:
    """What the command line asks for; its exit status, of which 1 is a check that failed."""
    return command("benchmarks.trainers", lambda: _bench(_parser().parse_args(words)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.trainers --rounds 3 --json docs/results/trainers_cpu.json",
    )
    add_version(parser)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each (default 2)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a sequence (default 512 2048 8192)"
    )
    parser.add_argument("--json", type=Path, default=Path("runs/bench_trainers.json"), help="where the figures go")
    return parser


def _bench(arguments: argparse.Namespace) -> int:
    # Refused before anything is timed: no data, or sizes that do not fit.
    config = load(BASE)
    missing = [f"{prefix}.bin" for prefix in config.data.train if not (ROOT / f"{prefix}.bin").is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is not there; run make quickstart first, which makes it")
    wrong = [length for length in arguments.lengths if length < 1 or TOKENS % length]
    if wrong:
        raise ValueError(f"--lengths {wrong[0]}: give divisors of {TOKENS}, the tokens of a step")
    speeds = measure(arguments.rounds, arguments.lengths)
    table = Table("tokens/s of training", *(f"{length:,} tokens" for length in arguments.lengths), "parameters")
    sizes = {name: parameters(load(BASE, words_of(name, arguments.lengths[0]))) for name in CONTENDERS}
    for name, by in speeds.items():
        table.add_row(name, *(f"{speed:,.0f}" for speed in by.values()), f"{sizes[name]:,}")
    Console(width=120).print(table)
    report = {
        **made_by("trainers"),
        "tokens_a_step": TOKENS,
        "parameters": sizes,
        "tokens_per_second": speeds,
    }
    write(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
