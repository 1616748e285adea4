"""Put together what `make gpu-check` takes to a machine with a GPU, torch and Triton, and no package registry.

Parts of runs/gpu-bundle, each under 60 MiB: the code; packages that are installed here and made of Python alone, or
nearly (site/); the quickstart's text, with the losses of a CPU if they were computed; and a Triton cache of what the
check launches, compiled here. README.md there says how to unpack them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.version import add_version
from atlas_megatron.reports.results import commit
from benchmarks.gpu.check import CACHE_PART, TRITON_CACHE

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("runs/gpu-bundle")
ARCHS = ("80", "90", "100")
MOST = 60 * 2**20  # bytes of a part
SPARE = 4 * 2**20  # of them: what the end of an archive may still need
# What the trainer needs, then what the peers need.
PACKAGES = (
    "megatron-core", "einops", "packaging", "psutil", "rich", "markdown-it-py", "mdurl", "pygments", "fla-core",
    "titans-pytorch", "assoc-scan", "axial-positional-embedding", "einx", "frozendict", "hyper-connections",
    "rotary-embedding-torch", "tensordict", "x-transformers",
)  # fmt: skip
UNPACKING = """\
Unpack all parts into one folder, then run the check there (torch and Triton are all that it needs):

    mkdir atlas && for part in *.tgz; do tar -xzf "$part" -C atlas; done && cd atlas && make gpu-check

Without make: PYTHONPATH=$PWD:$PWD/kernels:$PWD/site python3 -m benchmarks.gpu --out results
"""


def main(words: Sequence[str] | None = None) -> int:
    """What the command line asks for; its exit status, of which 1 is a check that failed."""
    return command("benchmarks.gpu.bundle", lambda: _bundle(_parser(), words))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m benchmarks.gpu.bundle --arch 90",
    )
    add_version(parser)
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the parts (default {OUT})")
    parser.add_argument("--arch", default="90", help="compute capabilities to compile for, by comma (default 90)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help=f"processes that compile (default {cores})")
    parser.add_argument("--no-cache", action="store_true", help="compile nothing: the GPU's machine does it")
    parser.add_argument("--cpu-losses", action="store_true", help="compute the losses of a CPU, an hour or so, and end")
    return parser


def _bundle(parser: argparse.ArgumentParser, words: Sequence[str] | None) -> int:
    arguments = parser.parse_args(words)
    if not set(arguments.arch.split(",")) <= set(ARCHS):
        parser.error(f"--arch {arguments.arch}: choose of {', '.join(ARCHS)}, by comma")
    if arguments.cpu_losses:
        return _cpu_losses()
    out: Path = arguments.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "README.md").write_text(UNPACKING, encoding="utf-8")
    (out / "COMMIT").write_text(commit() + "\n", encoding="utf-8")
    code = [(ROOT / name, name) for name in tracked()]
    made = pack(out, "code", [*code, (out / "README.md", "UNPACKED.md"), (out / "COMMIT", "COMMIT")])
    found, missing = installed()
    made += pack(out, "site", found)
    made += pack(out, "data", _of_folder(ROOT / "data/quickstart", "data/quickstart"))
    if not arguments.no_cache:
        folders = compiled(arguments.arch, arguments.jobs)
        inside = [pair for folder in folders for pair in _of_folder(folder, f"{CACHE_PART}/{folder.name}")]
        made += pack(out, CACHE_PART, inside)
    for part in made:
        print(f"{part}: {part.stat().st_size / 2**20:.1f} MiB")
    print(f"not installed here, so left out: {', '.join(missing) or 'nothing'}")
    if not (ROOT / "data/quickstart/train.bin").is_file():
        print("data/quickstart is not there: make quickstart prepares it; without it nothing is trained")
    return 0


def tracked() -> list[str]:
    """The files that are the code. Raises ValueError where there is no history that says so."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{ROOT} is no git checkout; make the parts in one")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def installed() -> tuple[list[tuple[Path, str]], list[str]]:
    """(the files of PACKAGES with their places under site/, the packages that are not installed here)."""
    found: list[tuple[Path, str]] = []
    missing = []
    for package in PACKAGES:
        try:
            files = importlib.metadata.distribution(package).files or []
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
            continue
        inside = [file for file in files if not file.parts[0].startswith("..") and "__pycache__" not in file.parts]
        found += [(Path(file.locate()), f"site/{file}") for file in inside if Path(file.locate()).is_file()]
    return found, missing


def _of_folder(folder: Path, place: str) -> list[tuple[Path, str]]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [(file, f"{place}/{file.relative_to(folder)}") for file in files]


def pack(out: Path, name: str, files: list[tuple[Path, str]], most: int = MOST) -> list[Path]:
    """Archives of the files (where they are, their places within), as many as keep each under `most` bytes."""
    made: list[Path] = []
    for number, group in enumerate(_groups(files, most - SPARE), 1):
        path = out / (f"{name}.tgz" if number == 1 else f"{name}-{number}.tgz")
        with tarfile.open(path, "w:gz") as archive:
            for file, place in group:
                archive.add(file, place)
        if path.stat().st_size > most:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, over {most}: one of its files is too large")
        made.append(path)
    return made


def _groups(files: list[tuple[Path, str]], most: int) -> Iterator[list[tuple[Path, str]]]:
    """By size as they lie, which packing only lessens."""
    group: list[tuple[Path, str]] = []
    size = 0
    for file, place in files:
        own = file.stat().st_size + 1024  # and its entry
        if group and size + own > most:
            yield group
            group, size = [], 0
        group.append((file, place))
        size += own
    if group:
        yield group


def compiled(archs: str, jobs: int) -> list[Path]:
    """The cache's folders of what the check launches, compiled for these compute capabilities, "80,90".

    In a process of its own: Triton reads its environment when it is imported. Raises ValueError where it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(TRITON_CACHE)
    words = [sys.executable, "-m", "benchmarks.gpu.compiling", archs, str(jobs)]
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        done = subprocess.run([*words, result.name], cwd=ROOT, env=environment, check=False)
        if done.returncode:
            raise ValueError(f"{' '.join(words[2:])} ended with status {done.returncode}")
        return [Path(folder) for folder in json.loads(result.read())]


def _cpu_losses() -> int:
    from benchmarks.gpu import training

    directory = Path(tempfile.mkdtemp(prefix="cpu-losses-")) / "run"
    words = training.loss_words("float32", "chunked", directory)
    records, why = training.trained(words, directory, float("inf"), gpu=False)
    if why:
        raise ValueError(f"the run on the CPU ended early: {why}")
    losses = {"losses": [record["loss"] for record in records], "words": words[1:]}
    training.CPU_LOSSES.write_text(json.dumps(losses) + "\n", encoding="utf-8")
    print(f"written: {training.CPU_LOSSES}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
