"""`atlas-generate MODEL --prompt TEXT`: continue a text with a trained model, in memory that does not grow with it."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from torch import Tensor

    from atlas_megatron.reader import Reader

EXAMPLES = """examples:
  atlas-generate runs/quickstart --prompt 'def main('
  atlas-generate exported/atlas-340m --prompt-file book.txt --tokens 500 --temperature 0.7
  cat *.py | atlas-generate runs/quickstart --prompt-file - --seed 3
  atlas-generate runs/quickstart --interactive
"""
TRUST_HELP = "run the code that lies in an exported folder; without it, the code installed here reads its weights"
FORGET, QUIT = "/forget", "/quit"


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; see `streaming.generate`."""

    temperature: float
    top_p: float
    seed: int


class Speaker:
    """Reads text and continues it, one sequence."""

    def __init__(self, reader: Reader, sampling: Sampling, segment: int) -> None:
        """segment: tokens that are read at once. Raises ValueError for arguments out of range."""
        import torch

        from atlas_megatron.streaming import check_sampling

        check_sampling(sampling.temperature, sampling.top_p)
        if segment < 1:
            raise ValueError(f"--segment {segment} must be at least 1 token")
        self.reader, self.sampling, self.segment = reader, sampling, segment
        self._generator = torch.Generator(reader.device).manual_seed(sampling.seed)
        self._logits: Tensor | None = None  # of the token after all that was read, [1, vocabulary]

    def read(self, file: TextIO) -> int:
        """Read a text to its end, in constant memory; the number of its tokens."""
        from atlas_megatron.pieces import pieces

        waiting: list[int] = []
        count = 0
        for piece in pieces(file, self.reader.tokenizer.encode):
            waiting += self.reader.tokenizer.encode(piece)
            while len(waiting) >= self.segment:
                self._take(waiting[: self.segment])
                waiting, count = waiting[self.segment :], count + self.segment
        if waiting:
            self._take(waiting)
        return count + len(waiting)

    def speak(self, tokens: int) -> Iterator[tuple[int, str]]:
        """Up to `tokens` (id, text) of the continuation; ends with the end of the document."""
        from atlas_megatron.pieces import Spoken
        from atlas_megatron.streaming import sample

        spoken, sampling = Spoken(self.reader.tokenizer), self.sampling
        for _ in range(tokens):
            assert self._logits is not None
            token = int(sample(self._logits, sampling.temperature, sampling.top_p, self._generator))
            self._take([token])
            if token == self.reader.tokenizer.eod:
                return
            yield token, spoken.add(token)

    def forget(self) -> None:
        self.reader.forget()
        self._logits = None

    def _take(self, tokens: list[int]) -> None:
        import torch

        batch = torch.tensor([tokens], device=self.reader.device)
        # Rows of the embedding beyond the tokenizer's vocabulary are never text.
        self._logits = self.reader.read(batch, keep=1)[:, -1, : self.reader.tokenizer.vocab_size].float()


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; an exit status. What went wrong is one line on standard error."""
    from atlas_megatron.train import quieten

    parser = _parser()
    asked = parser.parse_args(words)
    quieten()
    try:
        return _run(asked)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atlas-generate",
        description="Continue a text with a trained model, in memory that does not grow with the text.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a run's directory, or a folder exported for Hugging Face")
    parser.add_argument("--trust-remote-code", action="store_true", help=TRUST_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue")
    source.add_argument("--prompt-file", metavar="FILE", help="a file with it, of any length; - is standard input")
    source.add_argument("--interactive", action="store_true", help="turn by turn, with one memory")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to generate (default 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample from this much probability (default 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default 0)")
    parser.add_argument("--segment", type=int, default=2048, help="prompt tokens read at once (default 2048)")
    return parser


def _run(asked: argparse.Namespace) -> int:
    if asked.tokens < 1:
        raise ValueError(f"--tokens {asked.tokens} must be at least 1")
    if asked.prompt_file not in (None, "-") and not Path(asked.prompt_file).is_file():
        raise ValueError(f"--prompt-file {asked.prompt_file} is no file; give one, or - for standard input")
    from atlas_megatron.reader import open_reader

    reader = open_reader(asked.model, trust_remote_code=asked.trust_remote_code)
    speaker = Speaker(reader, Sampling(asked.temperature, asked.top_p, asked.seed), asked.segment)
    if asked.interactive:
        return _converse(speaker, asked.tokens)
    start = time.perf_counter()
    if asked.prompt is not None:
        read = speaker.read(io.StringIO(asked.prompt))
    elif asked.prompt_file == "-":
        read = speaker.read(sys.stdin)
    else:
        with open(asked.prompt_file, encoding="utf-8-sig", errors="replace") as file:
            read = speaker.read(file)
    if not read:
        raise ValueError("the prompt holds no token; give at least one character")
    _note(f"read {read:,} tokens", read, time.perf_counter() - start)
    if asked.prompt is not None:
        print(asked.prompt, end="", flush=True)
    _speak(speaker, asked.tokens)
    return 0


def _speak(speaker: Speaker, tokens: int) -> None:
    start, count = time.perf_counter(), 0
    for _, text in speaker.speak(tokens):
        print(text, end="", flush=True)
        count += 1
    print(flush=True)
    _note(f"wrote {count:,} tokens", count, time.perf_counter() - start)


def _note(what: str, tokens: int, seconds: float) -> None:
    print(f"[{what} in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} tokens/s]", file=sys.stderr, flush=True)


def _converse(speaker: Speaker, tokens: int) -> int:
    """Turns from standard input until its end: each line is read into the memory, then continued."""
    print(f"{FORGET} empties the memory, {QUIT} ends", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == QUIT:
            return 0
        if line.strip() == FORGET:
            speaker.forget()
        elif speaker.read(io.StringIO(line)):
            _speak(speaker, tokens)


if __name__ == "__main__":
    sys.exit(main())
