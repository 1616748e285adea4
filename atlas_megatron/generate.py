"""`atlas-generate MODEL --prompt TEXT`: continue a text with a trained model, in memory that does not grow with it."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atlas_megatron.cli.ending import command
from atlas_megatron.cli.options import add_trust_remote_code
from atlas_megatron.cli.version import add_version

if TYPE_CHECKING:
    from atlas_megatron.inference.speaker import Speaker

EXAMPLES = """examples:
  atlas-generate runs/quickstart --prompt 'def main('
  atlas-generate exported/atlas-340m --prompt-file book.txt --tokens 500 --temperature 0.7
  cat *.py | atlas-generate runs/quickstart --prompt-file - --seed 3
  atlas-generate runs/quickstart --interactive
  atlas-generate runs/quickstart --prompt 'class ' --samples 3 --top-k 40 --stop '\\n\\n'
  atlas-generate exported/atlas-340m --prompt-file book.txt --tokens 1 --save-memory book.memory
  atlas-generate exported/atlas-340m --memory book.memory --prompt 'In the end, '
"""
FORGET, QUIT = "/forget", "/quit"
NOTHING = "the prompt holds no token; give at least one character"


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; an exit status. What went wrong is one line on standard error."""
    from atlas_megatron.cli.quiet import quieten

    parser = _parser()

    def work() -> int:
        asked = parser.parse_args(words)
        quieten()
        return _run(asked)

    return command(parser.prog, work, on_memory="give a smaller --segment, or a smaller model")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atlas-generate",
        description="Continue a text with a trained model, in memory that does not grow with the text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    what = "a run's directory, one of its checkpoints, or a folder exported for Hugging Face"
    parser.add_argument("model", metavar="MODEL", help=what)
    add_trust_remote_code(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--prompt-file", metavar="FILE", help="a file with it, of any length; - is standard input")
    source.add_argument("--interactive", action="store_true", help="turn by turn, with one memory")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to generate (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample from this much probability (default 0.95)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from so many likeliest tokens (default 0: all)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", type=lambda text: text.replace(r"\n", "\n"),
        help=r"end before this text, \n a new line; may be given several times",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=1, help="so many continuations of one prompt (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    parser.add_argument("--segment", type=int, default=2048, help="prompt tokens read at once (default 2048)")
    parser.add_argument("--save-memory", type=Path, metavar="FILE", help="write what was read (an exported model's)")
    parser.add_argument(
        "--memory", "--load-memory", dest="load_memory", type=Path, metavar="FILE",
        help="go on from what --save-memory wrote",
    )  # fmt: skip
    return parser


def _run(asked: argparse.Namespace) -> int:
    if asked.tokens < 1:
        raise ValueError(f"--tokens {asked.tokens} must be at least 1")
    if asked.prompt is not None:
        # As of $(cat FILE): its mark, and bytes that are no UTF-8.
        asked.prompt = asked.prompt.encode("utf-8", "surrogateescape").decode("utf-8-sig", errors="replace")
    _check(asked)
    if asked.prompt_file not in (None, "-") and not Path(asked.prompt_file).is_file():
        raise ValueError(f"--prompt-file {asked.prompt_file} is no file; give one, or - for standard input")
    from atlas_megatron.data.text_files import opened, standard_input
    from atlas_megatron.inference.reader import open_reader
    from atlas_megatron.inference.speaker import Sampling, Speaker

    reader = open_reader(asked.model, trust_remote_code=asked.trust_remote_code)
    sampling = Sampling(asked.temperature, asked.top_p, asked.seed, asked.top_k)
    speaker = Speaker(reader, sampling, asked.segment)
    if asked.load_memory:
        reader.load_memory(asked.load_memory)
    if asked.interactive:
        return _converse(speaker, asked.tokens, asked.stop)
    start = time.perf_counter()
    if asked.prompt is not None:
        read = speaker.read(io.StringIO(asked.prompt))
    elif asked.prompt_file == "-":
        with standard_input() as text:
            read = speaker.read(text)
    else:
        with opened(Path(asked.prompt_file)) as found:  # compressed or not
            read = speaker.read(io.TextIOWrapper(found.bytes, encoding="utf-8-sig", errors="replace"))
    if not read:
        raise ValueError(NOTHING)
    _note(f"read {read:,} tokens", read, time.perf_counter() - start)
    if asked.save_memory:
        reader.save_memory(asked.save_memory)
        print(f"[what was read is in {asked.save_memory}]", file=sys.stderr, flush=True)
    for number in speaker.continuations(asked.samples):
        if asked.samples > 1:
            print(f"=== sample {number + 1} of {asked.samples} ===", flush=True)
        if asked.prompt is not None:
            print(asked.prompt, end="", flush=True)
        _speak(speaker, asked.tokens, asked.stop)
    return 0


def _check(asked: argparse.Namespace) -> None:
    """Raise ValueError for options that cannot be, or do not go together: before a model is loaded."""
    from atlas_megatron.inference.speaker import check_segment
    from atlas_megatron.inference.streaming import check_sampling

    check_sampling(asked.temperature, asked.top_p, asked.top_k)
    check_segment(asked.segment)
    if asked.samples < 1:
        raise ValueError(f"--samples {asked.samples} must be at least 1")
    if not 0 <= asked.seed < 2**63 - asked.samples:
        raise ValueError(f"--seed {asked.seed} is out of range; give a number from 0 to below 2^63")
    if asked.samples > 1 and (asked.interactive or asked.temperature == 0):
        why = "--interactive takes one" if asked.interactive else "--temperature 0 gives the same text each time"
        raise ValueError(f"--samples {asked.samples}, but {why}; leave one of them out")
    if "" in asked.stop:
        raise ValueError("--stop '' ends before anything is written; give a text")
    if asked.prompt == "":
        raise ValueError(NOTHING)
    _check_memories(asked)


def _check_memories(asked: argparse.Namespace) -> None:
    saved, loaded = asked.save_memory, asked.load_memory
    if asked.interactive and saved:
        raise ValueError("--save-memory is of a prompt; leave out --interactive")
    if saved and not saved.parent.is_dir():
        raise ValueError(f"--save-memory {saved} lies in no folder; make {saved.parent} first")
    if saved and saved.exists() and not saved.is_file():
        raise ValueError(f"--save-memory {saved} is no file that can be replaced; name another one")
    if loaded and not loaded.is_file():
        raise ValueError(f"--memory {loaded} is no file; give one that --save-memory wrote")


def until(texts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Texts as they come, to before the first stop; what may be the beginning of one is held back."""
    held = ""
    for text in texts:
        held += text
        found = [place for stop in stops if (place := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)]
            return
        kept = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - kept]
        held = held[len(held) - kept :]
    yield held


def _speak(speaker: Speaker, tokens: int, stops: Sequence[str] = ()) -> None:
    start, count = time.perf_counter(), 0

    def texts() -> Iterator[str]:
        nonlocal count
        for _, text in speaker.speak(tokens):
            count += 1
            yield text

    for text in until(texts(), stops):
        print(text, end="", flush=True)
    print(flush=True)
    _note(f"wrote {count:,} tokens", count, time.perf_counter() - start)


def _note(what: str, tokens: int, seconds: float) -> None:
    print(f"[{what} in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s]", file=sys.stderr, flush=True)


def _converse(speaker: Speaker, tokens: int, stops: Sequence[str]) -> int:
    """Turns from standard input until its end: each line is read into the memory, then continued."""
    from atlas_megatron.data.text_files import standard_input

    print(f"{FORGET} empties the memory, {QUIT} ends", file=sys.stderr)
    with standard_input() as text:
        while True:
            print("> ", end="", file=sys.stderr, flush=True)
            line = text.readline()
            if not line or line.strip() == QUIT:
                return 0
            if line.strip() == FORGET:
                speaker.forget()
            elif speaker.read(io.StringIO(line)):
                _speak(speaker, tokens, stops)


if __name__ == "__main__":
    sys.exit(main())
