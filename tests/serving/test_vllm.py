"""vLLM, in its own environment, answers what the exported model does; bad requests are told so, and others go on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from tests.support import exported_models
from tests.support.vllm_process import LENGTH, TOKENS

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("ATLAS_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="vLLM has no environment here: make setup-vllm"),
]
MODELS = {"memory": "M-M-", "hybrid": "M-*-", "Gated DeltaNet": "G-G-"}
TEXT = "7 sheep and 8 goats went over the hill number 49; nobody counted them.\n"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def environment() -> dict[str, str]:
    """With this checkout's code, on one core, offline; what vLLM keeps for states on a CPU: 1 GiB."""
    paths = os.pathsep.join((str(ROOT / "kernels"), str(ROOT)))
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return {**os.environ, **alone, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    for name, pattern in MODELS.items():
        exported_models.exported(root / name, pattern)
    return root


def in_vllm(job: Any, folder: Path) -> Any:
    """What vllm_process.py says to a job, in vLLM's environment."""
    (folder / "job.json").write_text(json.dumps(job))
    words = [str(PYTHON), str(ROOT / "tests/support/vllm_process.py"), "job.json", "out.json"]
    done = subprocess.run(
        words, env=environment(), cwd=folder, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out.json").read_text())


def continued(folder: Path, prompt: list[int], **options: Any) -> list[int]:
    """The tokens that the exported model itself writes, greedily."""
    model = AtlasForCausalLM.from_pretrained(folder).eval()
    given = torch.tensor([prompt])
    options["attention_mask"] = torch.ones_like(given)  # else it would take a token for padding
    found = model.generate(given, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, **options)
    return found[0, len(prompt) :].tolist()


def test_greedy_text_is_the_models_own(root: Path, tmp_path: Path) -> None:
    """Prompts of several lengths at once, one of them twice as long as training, read in pieces."""
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(250, (n,), generator=generator).tolist() for n in (5, 70, 9, 33, 1)]
    job = {str(root / name / "model"): prompts for name in MODELS}
    said = in_vllm(job, tmp_path)
    for folder in job:
        assert said[folder] == [continued(Path(folder), prompt) for prompt in prompts], folder


class Server:
    """`atlas-serve` of a model, and requests to it."""

    def __init__(self, folder: Path, memories: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = ["--port", str(self.port), "--memories", str(memories), "--max-length", str(LENGTH)]
        with log.open("w") as said:
            self.process = subprocess.Popen(
                [str(PYTHON), "-m", "atlas_megatron.serving.command", str(folder), *options, "--name", "atlas"],
                env=environment(), stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        until = time.monotonic() + 500
        while not self._healthy():
            assert self.process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1)

    def _healthy(self) -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
        except OSError:
            return False

    def ask(self, path: str, **words: Any) -> tuple[int, Any]:
        """Status and answer; of a stream the texts of its events."""
        given = json.dumps({"model": "atlas", "temperature": 0, "max_tokens": TOKENS, **words}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/{path}", given if words else None)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                text = answer.read().decode()
                return answer.status, _events(text) if words.get("stream") else json.loads(text)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def _events(text: str) -> list[str]:
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert found[-1] == "[DONE]"
    return [json.loads(event)["choices"][0]["text"] for event in found[:-1]]


@pytest.fixture(scope="module")
def memories(root: Path) -> Path:
    """A book that was read, a damaged one, and one of another model."""
    folder = root / "memories"
    folder.mkdir()
    for name, of in (("book", "hybrid"), ("other", "memory")):
        model = AtlasForCausalLM.from_pretrained(root / of / "model").eval()
        tokens = AutoTokenizer.from_pretrained(root / of / "model")(TEXT, return_tensors="pt").input_ids
        with torch.no_grad():
            model(tokens, use_cache=True).past_key_values.save_memory(folder / name)
    raw = bytearray((folder / "book").read_bytes())
    raw[-5] ^= 1
    (folder / "damaged").write_bytes(raw)
    return folder


@pytest.fixture(scope="module")
def server(root: Path, memories: Path) -> Iterator[Server]:
    folder = root / "hybrid/model"
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    server = Server(folder, memories, root / "log.txt")
    yield server
    server.process.terminate()
    server.process.wait(60)


def written(folder: Path, prompt: str) -> list[int]:
    """The tokens that the exported model writes after a prompt."""
    return continued(folder, AutoTokenizer.from_pretrained(folder)(prompt).input_ids)


def text_of(folder: Path, tokens: list[int]) -> str:
    """Their text as vLLM sends it: without a character at the end whose bytes are not complete."""
    return AutoTokenizer.from_pretrained(folder).decode(tokens).rstrip("\N{REPLACEMENT CHARACTER}")


def test_an_openai_style_endpoint(server: Server, root: Path) -> None:
    folder = root / "hybrid/model"
    assert [model["id"] for model in server.ask("models")[1]["data"]] == ["atlas"]
    expected = written(folder, TEXT)
    text = text_of(folder, expected)
    asked = {"ignore_eos": True, "return_token_ids": True}
    status, answer = server.ask("completions", prompt=TEXT, **asked)
    choice = answer["choices"][0]
    assert (status, choice["token_ids"], choice["text"]) == (200, expected, text)
    assert answer["usage"]["completion_tokens"] == TOKENS
    status, events = server.ask("completions", prompt=TEXT, stream=True, ignore_eos=True)
    assert status == 200 and len(events) > 1 and "".join(events) == text
    status, answer = server.ask("chat/completions", messages=[{"role": "user", "content": TEXT}], **asked)
    choice = answer["choices"][0]
    assert (status, choice["token_ids"], choice["message"]["content"]) == (200, expected, text)


def test_a_conversation_goes_on_from_a_memory_file(server: Server, root: Path) -> None:
    """Twice from one file, beside one that names none: none learns from another."""
    folder, question = root / "hybrid/model", "How many sheep?"
    asked = {"prompt": question, "ignore_eos": True, "return_token_ids": True}
    alone, after = written(folder, question), written(folder, TEXT + question)
    assert alone != after
    for _ in range(2):
        for words, expected in (({"vllm_xargs": {"memory": "book"}}, after), ({}, alone)):
            status, answer = server.ask("completions", **asked, **words)
            assert (status, answer["choices"][0]["token_ids"]) == (200, expected)


def test_a_bad_request_is_told_so_and_others_go_on(server: Server) -> None:
    for words, said in (
        ({"vllm_xargs": {"memory": "none"}}, "memory 'none' is no file in this server's folder, which has ['book',"),
        ({"vllm_xargs": {"memory": "../log.txt"}}, "memory '../log.txt' is no file in this server's folder"),
        ({"vllm_xargs": {"memory": "damaged"}}, "is damaged: its tensors are not those that were written"),
        ({"vllm_xargs": {"memory": "other"}}, "is the memory of another model: model.pattern: 'M-*-', not 'M-M-'"),
        ({"prompt": "a " * LENGTH}, f"{LENGTH}"),
        ({"model": "another"}, "another"),
    ):
        status, answer = server.ask("completions", **{"prompt": "How many?", **words})
        assert status in (400, 404) and said in json.loads(answer)["error"]["message"], answer
    assert server.ask("completions", prompt="How many?")[0] == 200


def test_prefix_caching_is_refused(root: Path) -> None:
    words = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(root / "memory/model")]
    words += ["--enable-prefix-caching"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode != 0 and "prefix caching keeps states at the ends of blocks" in done.stdout + done.stderr
