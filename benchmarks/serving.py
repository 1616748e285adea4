"""Ask one exported model by vLLM, by transformers' generate and by atlas-generate: tokens a second, time to first
token, and the bytes of one more session beside an attention model.

All three compute in one thread, and figures are of their CPU time: seconds that one core with nothing else to do would
take, whatever runs beside. vLLM runs in an environment of its own (make setup-vllm).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from atlas_megatron.reports.style import STYLE, save
from benchmarks.report import made_by, write

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"vllm": "vLLM with the plug-in", "generate": "transformers' generate", "atlas": "atlas-generate"}
AT_ONCE, LENGTHS = (1, 8, 32), (1024, 65536)
SHORTEST, LONGEST = 33, 64  # tokens of a prompt


def job_of(vocabulary: int, new: int, lengths: Sequence[int]) -> dict[str, Any]:
    """The requests: prompts of several lengths, random tokens of a fixed seed."""
    drawn = random.Random(7)
    sizes = [drawn.randint(SHORTEST, LONGEST) for _ in range(max(AT_ONCE))]
    prompts = [[drawn.randrange(vocabulary) for _ in range(size)] for size in sizes]
    return {"prompts": prompts, "at_once": list(AT_ONCE), "new": new, "lengths": list(lengths)}


def asked(way: str, python: Path, folder: Path, job: Path) -> dict[str, Any]:
    """The figures of one way. Raises RuntimeError with its last lines where it fails."""
    paths = os.pathsep.join((str(ROOT / "kernels"), str(ROOT)))
    one = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    vllm = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
    words = [str(python), "-m", "benchmarks.serving_requests", way, str(folder), str(job)]
    done = subprocess.run(words, env={**os.environ, **one, **vllm}, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{NAMES[way]}: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def session_bytes(folder: Path, lengths: Sequence[int]) -> dict[str, dict[int, int]]:
    """Bytes of one more session after so many tokens: of the model, and of one with full attention in every mixer's
    place, whose heads are as wide together as the model's first mixer's."""
    from atlas_megatron.hf.weights import described_in

    config = described_in(folder)
    return {
        "model": {length: row_bytes(config, length) for length in lengths},
        "full attention": {length: row_bytes(attention_like(config), length) for length in lengths},
    }


def attention_like(config: Any) -> Any:
    """The same model with full attention for every mixer."""
    from atlas_megatron.hf.configuration_atlas import AtlasConfig

    heads = {"heads": config.num_attention_heads, "head_dim": config.head_dim}
    pattern = "".join(symbol if symbol == "-" else "F" for symbol in config.pattern)
    named = {key: getattr(config, key) for key in ("hidden_size", "ffn_hidden_size", "vocab_size", "seq_length")}
    return AtlasConfig(pattern=pattern, attention={**config.attention, **heads}, **named)


def row_bytes(config: Any, length: int) -> int:
    """Of a session in float32 that has read so many tokens."""
    from atlas_megatron.hf.modeling_atlas import AtlasModel
    from atlas_megatron.serving.rows import Rows

    with torch.no_grad():
        return Rows(AtlasModel(config).eval(), length).bytes


def draw(report: dict[str, Any], path: Path) -> Path:
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
        for way, found in report["ways"].items():
            speeds = found["tokens_per_second"]
            left.plot([int(n) for n in speeds], list(speeds.values()), marker="o", label=NAMES[way])
        left.set(xscale="log", xlabel="requests at once", ylabel="tokens/s, one core", ylim=(0, None))
        left.set_xticks(AT_ONCE, [str(n) for n in AT_ONCE])
        left.legend()
        for name, found in report["session_bytes"].items():
            right.plot([int(n) for n in found], [size / 2**20 for size in found.values()], marker="o", label=name)
        right.set(xscale="log", yscale="log", xlabel="tokens that a session has read", ylabel="MiB of one more session")
        right.legend()
        figure.tight_layout()
    return save(figure, path)


def main(words: Sequence[str] | None = None) -> int:
    """What the command line asks for; its exit status."""
    return command("benchmarks.serving", lambda: _bench(_parser().parse_args(words)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.serving exported/quickstart --json docs/results/serving_cpu.json",
    )
    add_version(parser)
    parser.add_argument("model", nargs="?", type=Path, default=Path("exported/quickstart"), help="an exported folder")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer (default 32)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="prompts whose first token is timed")
    parser.add_argument("--vllm", type=Path, default=Path(".venv-vllm/bin/python"), help="the Python that has vLLM")
    parser.add_argument("--json", type=Path, default=Path("runs/bench_serving.json"), help="where the figures go")
    return parser


def _bench(arguments: argparse.Namespace) -> int:
    if not (arguments.model / "config.json").is_file():
        raise ValueError(f"{arguments.model} is no exported model; tools/convert_hf.py export RUN FOLDER writes one")
    if not arguments.vllm.is_file():
        raise ValueError(f"--vllm {arguments.vllm} is no Python; make one that has vLLM with: make setup-vllm")
    if arguments.new < 1 or min(arguments.lengths) < 1:
        raise ValueError(f"--new {arguments.new}, --lengths {arguments.lengths}: give at least one token")
    from atlas_megatron.hf.weights import described_in

    config = described_in(arguments.model)
    pythons = {way: arguments.vllm if way == "vllm" else Path(sys.executable) for way in NAMES}
    ways: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps(job_of(config.vocab_size, arguments.new, arguments.lengths)))
        for way, python in pythons.items():
            print(f"asking {NAMES[way]}", flush=True)
            ways[way] = asked(way, python.absolute(), arguments.model.resolve(), job)
    report = {
        **made_by("serving", "one thread; seconds of CPU time"),
        "model": {"pattern": config.pattern, "hidden_size": config.hidden_size},
        "prompt_tokens": [SHORTEST, LONGEST],
        "new_tokens": arguments.new,
        "ways": ways,
        "session_bytes": session_bytes(arguments.model, arguments.lengths),
    }
    write(arguments.json, report)
    _print(report, arguments)
    picture = draw(json.loads(arguments.json.read_text()), arguments.json.with_suffix(".png"))
    print(f"written: {arguments.json} and {picture}")
    return 0


def _print(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    titles = [f"tokens/s, {n} at once" for n in AT_ONCE] + [f"first token of {n:,}" for n in arguments.lengths]
    table = Table("", *titles)
    for way, found in report["ways"].items():
        speeds = [f"{speed:,.0f}" for speed in found["tokens_per_second"].values()]
        table.add_row(NAMES[way], *speeds, *(f"{s:,.2f} s" for s in found["first_token_seconds"].values()))
    console = Console(width=120)
    console.print(table)
    sizes = Table("bytes of one more session", *(f"{n:,} tokens" for n in arguments.lengths))
    for name, found in report["session_bytes"].items():
        sizes.add_row(name, *(f"{size:,}" for size in found.values()))
    console.print(sizes)


if __name__ == "__main__":
    sys.exit(main())
