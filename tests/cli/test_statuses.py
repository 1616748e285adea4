"""Every command ends alike: the same status and one line for the same thing that went wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import pytest

from atlas_megatron.cli.ending import INTERRUPTED, NON_FINITE, TERMINATED, UNFORESEEN, USER, NonFiniteError

ROOT = Path(__file__).parents[2]
NEITHER = ["--data", "x", "--out", "x"]
# Module, what does its work, words that lead there, the name in front of its line.
TOOLS = "atlas_megatron.commands"
COMMANDS = [
    ("atlas_megatron.train", "_dry_run", [str(ROOT / "configs/quickstart.toml"), "--dry-run"], "atlas-train"),
    ("atlas_megatron.generate", "_run", ["model", "--prompt", "a"], "atlas-generate"),
    ("atlas_megatron.evaluate.command", "_run", ["mqar", "model"], "atlas-eval"),
    ("atlas_megatron.serving.command", "_run", ["model"], "atlas-serve"),
    ("atlas_megatron.doctor", "_look", [], "atlas-doctor"),
    (f"{TOOLS}.prepare_data", "_prepare", ["a.txt", "--out", "x", "--train-tokenizer", "300"], "prepare_data"),
    (f"{TOOLS}.quickstart", "_quickstart", [], "quickstart"),
    (f"{TOOLS}.plot", "_plot", ["run"], "plot"),
    (f"{TOOLS}.convert_hf", "_export", ["export", "run", "folder"], "convert_hf"),
    (f"{TOOLS}.finetune", "_finetune", ["model", *NEITHER], "finetune"),
    (f"{TOOLS}.make_babilong", "_make", "qa1 --tokenizer a --filler b --lengths 9 99 --out c".split(), "make_babilong"),
    (f"{TOOLS}.scaling", "_fit", ["run"], "scaling"),
    (f"{TOOLS}.ladder", "_ladder", ["show"], "ladder"),
    (f"{TOOLS}.sweep", "_sweep", ["configs/quickstart.toml", "--lr", "1e-3"], "atlas-sweep"),
    ("benchmarks.memory", "_bench", [], "benchmarks.memory"),
    ("benchmarks.presets", "_bench", [], "benchmarks.presets"),
    ("benchmarks.shards", "_bench", [], "benchmarks.shards"),
    ("benchmarks.kernel_resources", "_measure", [], "benchmarks.kernel_resources"),
    ("benchmarks.launches", "_count", [], "benchmarks.launches"),
    ("benchmarks.static_times", "_bound", [], "benchmarks.static_times"),
    ("benchmarks.trainers", "_bench", [], "benchmarks.trainers"),
    ("benchmarks.serving", "_bench", [], "benchmarks.serving"),
    ("benchmarks.gpu.check", "_check", [], "benchmarks.gpu"),
    ("benchmarks.gpu.bundle", "_bundle", [], "benchmarks.gpu.bundle"),
]
EACH = pytest.mark.parametrize(("module", "work", "words", "name"), COMMANDS, ids=lambda given: str(given)[:24])


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def work(*_: object, **__: object) -> NoReturn:
        raise error

    return work


def told_to_end(*_: object) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    return 0


@EACH
def test_each_ending_has_one_status_and_one_line(
    module: str, work: str, words: list[str], name: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = import_module(module)
    wanted = {
        ValueError("what was given\nis wrong"): (USER, "what was given is wrong"),
        FileNotFoundError(errno.ENOENT, "No such file", "a b"): (USER, "a b: No such file; give one that is there"),
        OSError(errno.ENOSPC, "No space left on device"): (USER, "No space left on device; make room"),
        MemoryError(): (USER, "memory does not suffice"),
        NonFiniteError("loss is nan"): (NON_FINITE, "loss is nan"),
        KeyboardInterrupt(): (INTERRUPTED, "interrupted"),
    }
    for error, (status, line) in wanted.items():
        monkeypatch.setattr(command, work, raising(error))
        assert command.main(words) == status
        said = capsys.readouterr()
        assert said.err.startswith(f"{name}: ") and line in said.err and said.err.count("\n") == 1 and not said.out
    monkeypatch.setattr(command, work, raising(KeyError("nobody thought of it")))
    assert command.main(words) == UNFORESEEN
    assert f"{name}: unforeseen: KeyError" in capsys.readouterr().err


@EACH
def test_sigterm_ends_it_as_an_error_does(
    module: str, work: str, words: list[str], name: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if name == "atlas-train":
        pytest.skip("a run saves; see test_stop_signals.py")
    command, before = import_module(module), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(command, work, told_to_end)
    assert command.main(words) == TERMINATED
    assert capsys.readouterr().err.startswith(f"{name}: ended by SIGTERM")
    assert signal.getsignal(signal.SIGTERM) == before


@EACH
@pytest.mark.parametrize("taken", ["by nobody", "by a full disk"])
def test_an_output_that_cannot_be_written_is_said(
    module: str, work: str, words: list[str], name: str, taken: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Even where it was so short that it is written when all is done."""
    read, write = os.pipe()
    os.close(read)
    if taken == "by a full disk":
        os.close(write)
        write = os.open("/dev/full", os.O_WRONLY)
    command = import_module(module)
    monkeypatch.setattr(command, work, lambda *_: print("done") or 0)
    with os.fdopen(write, "w", encoding="utf-8") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert command.main(words) == USER
        monkeypatch.undo()
    line = "who read the output has gone away" if taken == "by nobody" else "No space left on device; make room"
    said = capsys.readouterr().err
    assert said.startswith(f"{name}: {line}") and said.count("\n") == 1


@EACH
def test_what_an_encoding_does_not_have_is_shown_by_number(
    module: str, work: str, words: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = import_module(module)
    monkeypatch.setattr(command, work, lambda *_: print("\N{SNOWMAN}\udcff") or 0)
    with (tmp_path / "out").open("w", encoding="ascii") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert command.main(words) == 0
    assert (tmp_path / "out").read_text().strip() == r"\u2603\udcff"


@EACH
def test_an_unknown_option_is_the_users(module: str, work: str, words: list[str], name: str) -> None:
    if name == "finetune":
        pytest.skip("--data takes every word")
    with pytest.raises(SystemExit) as left:
        import_module(module).main([*words, "--no-such-option"])
    assert left.value.code == USER


def test_no_command_is_left_out() -> None:
    """All that read a command line stand above; launchers and experiments have tests of their own."""
    found = [file for room in ("tools", "benchmarks", "atlas_megatron") for file in (ROOT / room).rglob("*.py")]
    texts = {file: file.read_text(encoding="utf-8") for file in found if file.name != "held.py"}
    parsers = "= argparse.ArgumentParser(", "held.parser_of("
    commands = {file.stem for file, text in texts.items() if any(parser in text for parser in parsers)}
    assert commands == {module.split(".")[-1] for module, *_ in COMMANDS}


def test_a_second_sigterm_and_a_forked_child_end_at_once() -> None:
    program = (
        "import os, signal, sys, time; from atlas_megatron.cli.ending import command\n"
        "def work():\n"
        "    child = os.fork()\n"
        "    if not child: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "    finally: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "sys.exit(command('atlas-x', work))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=50, check=False,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == (f"{-signal.SIGTERM}\n", -signal.SIGTERM), done.stderr


def test_ctrl_c_while_libraries_are_imported_is_a_line() -> None:
    program = (
        "import os, signal; from atlas_megatron.cli.ending import say_interrupts\n"
        "say_interrupts('plot'); os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(10)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (INTERRUPTED, "plot: interrupted\n")


def test_help_that_nobody_reads_to_its_end() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/prepare_data.py"), "--help"], stdout=write, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    os.close(write)
    # argparse passes over what it cannot write.
    assert done.returncode in (0, USER) and "Traceback" not in done.stderr and "ignored" not in done.stderr
