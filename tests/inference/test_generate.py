"""atlas-generate: a prompt of any length in pieces, text as it comes, turns with one memory, bad input."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from atlas_megatron.generate import main, until
from atlas_megatron.hf.export import export
from atlas_megatron.inference import reader as readers
from atlas_megatron.inference.reader import open_reader
from atlas_megatron.inference.speaker import Sampling, Speaker
from atlas_megatron.inference.streaming import sample
from tests.support import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that has trained."""
    root = tmp_path_factory.mktemp("run")
    # Without Newton-Schulz, which blows rounding up: the likeliest token shall not hang on where a text is cut.
    done = tiny_run.train(tiny_run.write(root), "memory.preset=omeganet")
    assert done.returncode == 0, done.stderr
    return root / "run"


def generate(*words: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "atlas_megatron.generate", *words],
        input=given, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


class Counting:
    """A reader whose next token is the count of those it has read, and the most it was given at once."""

    def __init__(self) -> None:
        self.tokenizer = SimpleNamespace(
            encode=lambda text: [ord(c) % 50 for c in text], decode=self._decode, vocab_size=1000, eod=999
        )
        self.device, self.longest = torch.device("cpu"), 0
        self.forget()

    @staticmethod
    def _decode(ids: Sequence[int]) -> str:
        return "".join(f"<{i}>" for i in ids)

    def forget(self) -> None:
        self.seen = 0

    def read(self, tokens: torch.Tensor, keep: int | None = None) -> torch.Tensor:
        self.longest = max(self.longest, tokens.shape[1])
        counts = self.seen + torch.arange(1, tokens.shape[1] + 1)
        self.seen += tokens.shape[1]
        return torch.nn.functional.one_hot(counts[None], 1200).double()


def test_a_long_prompt_is_read_in_segments_and_continued_from_its_end() -> None:
    reader = Counting()
    speaker = Speaker(reader, Sampling(0.0, 1.0, 0), segment=7)
    assert speaker.read(io.StringIO("abcde " * 10)) == 60 and reader.longest == 7
    assert [token for token, _ in speaker.speak(3)] == [60, 61, 62]
    # The memory has read its own words.
    assert speaker.read(io.StringIO("xyz")) == 3
    assert [token for token, _ in speaker.speak(2)] == [66, 67]
    speaker.forget()
    speaker.read(io.StringIO("xyz"))
    assert [token for token, _ in speaker.speak(1)] == [3]


def test_what_ends_inside_a_character_is_given_out_at_the_end() -> None:
    reader = Counting()
    shown = {3: "\N{REPLACEMENT CHARACTER}", 998: "\N{REPLACEMENT CHARACTER}"}
    reader.tokenizer.decode = lambda ids: "".join(shown.get(i, f"<{i}>") for i in ids)
    speaker = Speaker(reader, Sampling(0.0, 1.0, 0), segment=7)
    speaker.read(io.StringIO("xy"))
    assert [text for _, text in speaker.speak(2)] == ["<2>", "\N{REPLACEMENT CHARACTER}"]  # no more are asked for
    speaker.forget()
    speaker.read(io.StringIO("a" * 997))
    assert [text for _, text in speaker.speak(9)] == ["<997>", "", "\N{REPLACEMENT CHARACTER}"]  # the document ends


def test_it_ends_with_the_document() -> None:
    reader = Counting()
    speaker = Speaker(reader, Sampling(0.0, 1.0, 0), segment=500)
    speaker.read(io.StringIO("a" * 997))
    assert [token for token, _ in speaker.speak(9)] == [997, 998]


@pytest.mark.parametrize(
    ("texts", "stops", "said"),
    [
        (["ab", "cd"], [], "abcd"),
        (["a", "b\n", "\nc"], ["\n\n"], "ab"),
        (["a", "b\n", "c"], ["\n\n"], "ab\nc"),
        (["one END two"], ["END", "one E"], ""),
        (["aa", "ab", "x"], ["aab"], "a"),
        (["x", "EN"], ["END"], "xEN"),
    ],
)
def test_it_ends_before_a_stop(texts: list[str], stops: list[str], said: str) -> None:
    assert "".join(until(texts, stops)) == said


def test_what_may_be_a_stop_is_held_back() -> None:
    came = until(iter(["x E", "N", "T"]), ["END"])
    assert [next(came), next(came), next(came)] == ["x ", "", "ENT"]


def test_the_likeliest_tokens_alone_are_drawn() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.9, 0.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = {int(sample(logits, 5.0, 1.0, generator, top_k=2)) for _ in range(60)}
    assert drawn == {1, 2}
    assert int(sample(logits, 5.0, 1.0, generator, top_k=1)) == 1
    assert {int(sample(logits, 9.0, 1.0, generator, top_k=9)) for _ in range(99)} == {0, 1, 2, 3}


def test_however_little_is_left_to_draw_from_a_token_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    for temperature, top_p in ((1.0, 1e-300), (1e-300, 0.5), (1e300, 1e-40)):
        assert int(sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature, top_p, generator)) in range(3)


def test_several_samples_go_on_from_one_prompt(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run), "--prompt", "the memory", "--tokens", "6", "--temperature", "2", "--seed", "4"]
    with tiny_run.a_world_that_is_left():
        assert main([*words, "--samples", "2"]) == 0
        both = capsys.readouterr().out
        assert main(words) == 0
        first = capsys.readouterr().out
    with tiny_run.a_world_that_is_left():
        assert main([*words[:-1], "5"]) == 0
        second = capsys.readouterr().out
    assert first != second
    assert both == f"=== sample 1 of 2 ===\n{first}=== sample 2 of 2 ===\n{second}"


@pytest.mark.slow
def test_a_memory_is_saved_and_gone_on_from(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, memory = export(run, tmp_path / "model"), tmp_path / "read.memory"
    words = ["--tokens", "8", "--temperature", "0"]
    assert main([str(model), "--prompt", "the memory learns at", *words, "--save-memory", str(memory)]) == 0
    capsys.readouterr()
    assert main([str(model), "--prompt", " test time", *words, "--memory", str(memory)]) == 0
    gone_on = capsys.readouterr().out
    assert main([str(model), "--prompt", " test time", *words, "--load-memory", str(memory)]) == 0
    assert capsys.readouterr().out == gone_on  # its name of before
    assert main([str(model), "--prompt", "the memory learns at test time", *words]) == 0
    assert gone_on == capsys.readouterr().out.removeprefix("the memory learns at")
    memory.write_bytes(b"none")
    for words, said in (
        ([str(model), "--prompt", "a", "--load-memory", str(memory)], "give a file that save_memory wrote"),
        ([str(run), "--prompt", "a", "--save-memory", str(memory)], "export the run first"),
    ):
        with tiny_run.a_world_that_is_left():
            assert main(words) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("atlas-generate: ") == 1
    assert memory.read_bytes() == b"none"


@pytest.mark.slow
def test_the_command(run: Path, tmp_path: Path) -> None:
    # A few times the trained length: beyond ten times it, rounding grows from a millionth to a hundredth of a logit.
    prompt = "the memory learns at test time " * 6
    whole = generate(str(run), "--prompt", prompt, "--tokens", "12", "--temperature", "0")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.startswith(prompt) and "[wrote 12 tokens in" in whole.stderr
    file = tmp_path / "prompt.txt"
    file.write_text(prompt)
    # Segments of another length, another way in: the same text, while no two tokens are as likely as each other.
    segmented = generate(str(run), "--prompt-file", str(file), "--tokens", "12", "--temperature", "0", "--segment", "5")
    assert segmented.stdout == whole.stdout[len(prompt) :]
    piped = generate(str(run), "--prompt-file", "-", "--tokens", "12", "--temperature", "0", given=prompt)
    assert piped.stdout == segmented.stdout
    turns = generate(str(run), "--interactive", "--tokens", "3", given="the memory\n/forget\nthe window\n/quit\n")
    assert turns.returncode == 0 and turns.stderr.count("[wrote") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", ""], "the prompt holds no token"),
        (["--prompt", "a", "--tokens", "0"], "--tokens 0 must be at least 1"),
        (["--prompt", "a", "--segment", "0"], "--segment 0 must be at least 1 token"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0 must be 0"),
        (["--prompt", "a", "--top-p", "0"], "top_p=0.0 must lie in (0, 1]"),
        (["--prompt", "a", "--top-k", "-1"], "top_k=-1 must be 0 (all tokens) or more"),
        (["--prompt", "a", "--temperature", "nan"], "temperature=nan must be 0"),
        (["--prompt", "a", "--samples", "0"], "--samples 0 must be at least 1"),
        (["--prompt", "a", "--samples", "2", "--temperature", "0"], "gives the same text each time"),
        (["--interactive", "--samples", "2"], "--interactive takes one"),
        (["--prompt", "a", "--stop", ""], "--stop '' ends before anything is written"),
        (["--prompt", "a", "--save-memory", "no/such/file"], "lies in no folder; make no/such first"),
        (["--prompt-file", "missing.txt"], "--prompt-file missing.txt is no file"),
        (["--prompt", "a", "--temperature", "inf"], "temperature=inf must be 0"),
        (["--prompt", "a", "--top-p", "nan"], "top_p=nan must lie in (0, 1]"),
        (["--prompt", "a", "--seed", "-1"], "--seed -1 is out of range"),
        (["--prompt", "a", "--seed", "99999999999999999999"], "--seed 99999999999999999999 is out of range"),
        (["--prompt", "a", "--save-memory", "/dev/null"], "/dev/null is no file that can be replaced"),
        (["--prompt", "a", "--save-memory", "/"], "/ is no file that can be replaced"),
        (["--prompt", "a", "--memory", "missing"], "--memory missing is no file"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "open_reader", lambda *_, **__: pytest.fail("loaded a model before it looked"))
    assert main(["model", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


class Listening(Counting):
    """Says what it was given to read."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[int] = []

    def read(self, tokens: torch.Tensor, keep: int | None = None) -> torch.Tensor:
        self.heard += tokens[0].tolist()
        return super().read(tokens, keep)


@pytest.mark.parametrize("way", ["--prompt", "a file", "standard input", "--interactive"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = b"\xef\xbb\xbfab \xff\n"
    listening = Listening()
    monkeypatch.setattr(readers, "open_reader", lambda path, trust_remote_code: listening)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))
    (tmp_path / "prompt.txt").write_bytes(raw)
    words = {
        "--prompt": ["--prompt", os.fsdecode(raw)],
        "a file": ["--prompt-file", str(tmp_path / "prompt.txt")],
        "standard input": ["--prompt-file", "-"],
        "--interactive": ["--interactive"],
    }[way]
    assert main(["model", *words, "--tokens", "1"]) == 0
    text = "ab \N{REPLACEMENT CHARACTER}\n"
    heard = listening.tokenizer.encode(text)
    assert listening.heard[: len(heard)] == heard
    assert "\ufeff" not in capsys.readouterr().out


@pytest.mark.parametrize("exported", [False, True], ids=["run", "exported"])
def test_it_goes_on_from_a_kept_state(run: Path, tmp_path: Path, exported: bool) -> None:
    with tiny_run.a_world_that_is_left():
        reader = open_reader(export(run, tmp_path / "model") if exported else run)
        generator = torch.Generator().manual_seed(3)
        start, one, other = torch.randint(200, (3, 2, 21), generator=generator)
        reader.read(start)
        mark = reader.mark()
        after = reader.read(one)
        for _ in range(2):
            reader.back(mark)
            torch.testing.assert_close(reader.read(one), after, rtol=0, atol=0)
        reader.back(mark)
        assert not torch.equal(reader.read(other), after)
        reader.forget()
        beginning = reader.mark()
        whole = reader.read(torch.cat([start, one], 1))[:, 21:]
        torch.testing.assert_close(whole, after, rtol=1e-4, atol=1e-4)
        reader.back(beginning)
        reader.read(start)
        torch.testing.assert_close(reader.read(one), after, rtol=0, atol=0)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder; give the directory of a run or an exported model"):
        open_reader(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        open_reader(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds a model of type 'llama'"):
        open_reader(tmp_path)
