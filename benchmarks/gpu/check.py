"""Check and time the kernels on a machine with one GPU; every figure is on the disk as soon as it is known.

OUT/check.jsonl gets a line a figure; OUT/check.json and OUT/check.md are made of it after every section. A section is a
process with a time limit; where it dies, its other parts go on in a new one. Where a kernel's numerics are red, what
would time that kernel is left out. A second call with the same OUT adds to the first: `--sections more` trains the runs
that do not fit in it. --dry-run goes through the host code of every section without a GPU, and times nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from atlas_megatron.reports.results import commit
from benchmarks import goals
from benchmarks.gpu import report, training
from benchmarks.gpu.bench import Bench, is_lasting
from benchmarks.gpu.lines import BEGUN, DONE, FAILED, SKIPPED, Lines, figures, of_last_run, states
from benchmarks.gpu.numerics import GREEN
from benchmarks.gpu.sections import LOSSES, NUMERICS, SECTIONS, Section

ROOT = Path(__file__).resolve().parents[2]
CHOSEN = [name for name, section in SECTIONS.items() if section.chosen]
# Where a prepared Triton cache is unpacked: its files name each other by their whole paths.
TRITON_CACHE = Path("/tmp/atlas-triton")
CACHE_PART = "triton-cache"
LEAST = 10  # seconds that a process is begun for
GRACE = 4  # of them the last, in which it and what it started come to an end
LATE = "its time was over"
BROKEN = 3  # a part's process can do nothing more on the GPU


def main(words: Sequence[str] | None = None) -> int:
    """What the command line asks for; its exit status, of which 1 is a check that failed."""
    return command("benchmarks.gpu", lambda: _check(_parser(), words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"sections: {', '.join(CHOSEN)}; by name alone: {', '.join(SECTIONS.keys() - set(CHOSEN))}\n"
        "example: python -m benchmarks.gpu --sections start,numerics,op --out docs/results/gpu",
    )
    add_version(parser)
    parser.add_argument("--out", type=Path, help="folder of the results (docs/results/gpu; dry: runs/gpu-check-dry)")
    parser.add_argument("--sections", default=",".join(CHOSEN), help="which, by comma, in this order")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds for all of them (default 480)")
    parser.add_argument("--dry-run", action="store_true", help="the host code of every section, on the fake GPU")
    parser.add_argument("--within", nargs=3, metavar=("SECTION", "PARTS", "SECONDS"), help=argparse.SUPPRESS)
    return parser


def _check(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> int:
    arguments = parser.parse_args(words)
    names = [name for name in arguments.sections.split(",") if name]
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--sections {','.join(unknown)} is unknown; choose of {', '.join(SECTIONS)}")
    dry = arguments.dry_run
    out = arguments.out or ROOT / ("runs/gpu-check-dry" if dry else "docs/results/gpu")
    if arguments.within:
        section, parts, seconds = arguments.within
        return run_parts(Lines(out), section, parts.split("\t"), dry, float(seconds))
    if not dry and not torch.cuda.is_available():
        said = "no GPU is visible; run it on a machine with one (--dry-run goes through the host code here)"
        print(f"benchmarks.gpu: {said}", file=sys.stderr)
        return 2
    lines, until = Lines(out), time.monotonic() + arguments.budget
    shown = " ".join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if words is None else words)])
    lines.add({"run": header(shown, dry)})
    try:
        if not dry and (ROOT / CACHE_PART).is_dir():
            shutil.copytree(ROOT / CACHE_PART, TRITON_CACHE, dirs_exist_ok=True)
        for name in names:
            if not dry and SECTIONS[name].title in (goals.TRAINING, LOSSES):
                prepare_text()
            run_section(lines, name, until, dry)
            report.write(lines)
    finally:
        made = report.write(lines)
        print(f"written: {out}/check.json, check.md")
    for what, why in made["not_run"].items():
        print(f"not run: {what}: {why}")
    return 1 if red_kernels(lines) or (dry and made["not_run"]) else 0


def prepare_text() -> None:
    """The quickstart's, where it is not there yet."""
    if not (training.DATA / "train.bin").is_file() and importlib.util.find_spec("megatron"):
        program = "from atlas_megatron.commands import quickstart as q; from atlas_megatron.config import load"
        subprocess.run([sys.executable, "-c", f"{program}; raise SystemExit(q.prepare(load(q.CONFIG)))"], cwd=ROOT)


def header(shown: str, dry: bool) -> dict[str, Any]:
    """What a run says of itself. A folder that was unpacked has no history: its commit stands in COMMIT."""
    kept = ROOT / "COMMIT"
    device = "none" if dry else torch.cuda.get_device_name()
    at = kept.read_text(encoding="utf-8").strip() if kept.is_file() else commit()
    return {"command": shown, "commit": at, "device": device, "dry_run": dry}


def run_section(lines: Lines, name: str, until: float, dry: bool) -> None:
    """Its parts within its limit and the whole budget, in a process, and in another where one dies."""
    section = SECTIONS[name]
    end = min(until, time.monotonic() + section.cap)
    red = red_kernels(lines)
    left = []
    for part, of in section.parts.items():
        if stopped := [kernel for kernel in of.needs if kernel in red]:
            lines.part(name, part, SKIPPED, f"the numerics of {', '.join(stopped)} are red")
        else:
            left.append(part)
    print(f"{name}: {', '.join(left)}", flush=True)
    if dry:
        run_parts(lines, name, left, dry, section.cap)
        return
    while left and end - time.monotonic() > LEAST:
        process(lines.path.parent, name, left, end - time.monotonic())
        known = _states(lines)
        for part in left:
            if known.get((name, part), ("", ""))[0] == BEGUN:
                late = time.monotonic() >= end - GRACE
                lines.part(name, part, FAILED, LATE if late else "its process died")
        given, left = left, [part for part in left if (name, part) not in known]
        if given == left:  # not even begun: another process would end as this one did
            break
    for part in left:
        lines.part(name, part, SKIPPED, "no time was left" if end - time.monotonic() <= LEAST else "it did not begin")


def process(out: Path, name: str, parts: list[str], seconds: float, dry: bool = False) -> int:
    """One process for these parts, and its status: told to end when its time is over or this one ends, then killed, and
    with it what it started."""
    words = [sys.executable, "-m", "benchmarks.gpu", "--out", str(out.resolve()), *(["--dry-run"] if dry else [])]
    words += ["--within", name, "\t".join(parts), f"{seconds - GRACE:.0f}"]
    environment = {"TRITON_CACHE_DIR": str(TRITON_CACHE)} | os.environ
    run = subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True)
    try:
        run.wait(max(0.0, seconds - GRACE / 2))
    except subprocess.TimeoutExpired:
        print(f"{name}: its time is over", flush=True)
    finally:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            run.terminate()
            run.wait(GRACE / 2)
        with suppress(ProcessLookupError):  # of the group none may be left
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    return run.returncode


def run_parts(lines: Lines, name: str, parts: list[str], dry: bool, seconds: float) -> int:
    """In this process: each part, its state before and after it; what fails is named and the next one goes on."""
    section: Section = SECTIONS[name]
    bench = Bench(lines, dry, time.monotonic() + seconds, section.title)
    for part in parts:
        lines.part(name, part, BEGUN)
        try:
            with bench.counting_compilations(part):
                section.parts[part].run(bench)
        except Exception as error:  # what one part lacks is no reason to lose the others
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            lines.part(name, part, FAILED, said)
            print(f"{name} / {part}: {said}", flush=True)
            if not dry and is_lasting(error):
                return BROKEN
        else:
            lines.part(name, part, DONE)
        if not dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return 0


def red_kernels(lines: Lines) -> set[str]:
    """Whose numerics did not hold or could not be computed; of what had no time nothing is known, and it is timed."""
    _, kept = of_last_run(lines.read())
    found = figures(kept).get(SECTIONS[NUMERICS].title, {})
    red = {kernel for kernel, of in found.items() if isinstance(of, dict) and of.get(GREEN) is False}
    of_parts = {part: state for (name, part), state in states(kept).items() if name == NUMERICS}
    return red | {part for part, (state, why) in of_parts.items() if state == FAILED and why != LATE}


def _states(lines: Lines) -> dict[tuple[str, str], tuple[str, str]]:
    """Of this run: what an earlier one did is to be done again where it is asked for."""
    every = lines.read()
    last = max((at for at, line in enumerate(every) if "run" in line), default=-1)
    return states(every[last + 1 :])
