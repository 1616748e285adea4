"""lm-eval over a reader: its answers are a plain forward's, however texts are batched, cut and cached."""

from __future__ import annotations

import importlib
import json
import math
import pickle
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.evaluator
import pytest
import torch
from lm_eval.api.instance import Instance

from atlas_megatron.config import Config
from atlas_megatron.data.tokenizer import train_tokenizer
from atlas_megatron.evaluate import harness
from atlas_megatron.evaluate.continuations import Generation, Question, alike, ask, write
from atlas_megatron.evaluate.harness import AtlasLM, run
from atlas_megatron.hf.export import export
from atlas_megatron.inference.reader import HuggingFaceReader, open_reader
from tests.support import cached_tasks, tiny_run
from tests.support import hf_checkpoints as checkpoints
from tests.support.hf_and_megatron import CALM, settings

TOLERANCE = {"rel": 0, "abs": 1e-5}
TEXT = "the memory learns at test time what the window of the text says. "
QUESTIONS = [
    {"question": "the memory learns", "choices": ["at test time", "what", "the window of the text"], "answer": 0},
    {"question": TEXT * 2 + "the window", "choices": ["of the text", "learns at"], "answer": 0},
    {"question": "a", "choices": ["b", "the write", "it"], "answer": 2},
    {"question": TEXT + "what the", "choices": ["time, the time", "write"], "answer": 1},
    {"question": TEXT, "choices": ["a b c d e", "the", "reads it"], "answer": 1},
]
DOCUMENTS = [{"text": text} for text in (TEXT * 3, "one", "the write reads\nthe window", TEXT + "what it says")]
SHAPES = {"one by one": (1, 512), "all at once": (8, 512), "in small pieces": (3, 7), "token by token": (2, 1)}

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/{name}.jsonl}}
  cache_dir: {folder}/cache
test_split: test
metadata: {{version: 1.0}}
"""
KINDS = {
    "choices": (QUESTIONS, """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""),
    "documents": (DOCUMENTS, """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""),
    "endings": (QUESTIONS, """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "q"], max_gen_toks: 9}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and its model exported."""
    root = tmp_path_factory.mktemp("saved")
    train_tokenizer([TEXT * 40], 290, root / "tokenizer")
    base = settings("M-*-A-", **CALM)
    # More rows of the embedding than tokens.
    config = replace(
        base, model=replace(base.model, vocab_size=304), data=replace(Config().data, tokenizer=str(root / "tokenizer"))
    )
    with checkpoints.one_process():
        checkpoints.save(config, root / "run/checkpoints/step_00000000")
    export(root / "run", root / "model")
    return root


@pytest.fixture(scope="module")
def reader(saved: Path) -> HuggingFaceReader:
    """In float64, where a cut moves nothing but the last digits."""
    found = HuggingFaceReader(saved / "model")
    found._model.double()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks and their data."""
    root = tmp_path_factory.mktemp("tasks")
    for name, (rows, task) in KINDS.items():
        (root / f"{name}.yaml").write_text(TASK.format(name=name, folder=root) + task)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval describes the machine with every result, for which it asks a dozen other programs."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)


def plain(reader: HuggingFaceReader, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By one forward over the whole text, without a cache."""
    with torch.no_grad():
        logits = reader._model(torch.tensor([[*context, *continuation]]), use_cache=False).logits
    logits = logits[0, len(context) - 1 : -1, : reader.tokenizer.vocab_size]
    target = torch.tensor(continuation)
    return logits.log_softmax(-1)[torch.arange(len(target)), target].sum().item(), bool(
        (logits.argmax(-1) == target).all()
    )


def split(reader: HuggingFaceReader, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Spaces between the two belong to the second."""
    encode = reader.tokenizer.encode
    before = len(encode(context.rstrip()))
    whole = encode(context + continuation)
    return whole[:before], whole[before:]


def requests(folder: Path, name: str) -> list[Instance]:
    """What lm-eval asks for a task."""
    with harness._offline():
        task = harness._load(harness._manager([name], folder), [name])[name][name]
        task.set_config("num_fewshot", 0)
        task.build_all_requests()
    return task.instances


def instance(*arguments: Any, kind: str = "loglikelihood") -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_choices_are_as_likely_as_in_a_plain_forward(
    reader: HuggingFaceReader, folder: Path, shape: tuple[int, int]
) -> None:
    asked = requests(folder, "choices")
    assert len(asked) == 13
    found = AtlasLM(reader, *shape).loglikelihood(asked, disable_tqdm=True)
    wanted = [plain(reader, *split(reader, *request.args)) for request in asked]
    # In lm-eval's order.
    assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], **TOLERANCE)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in wanted]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_documents_are_read_whole(reader: HuggingFaceReader, folder: Path, shape: tuple[int, int]) -> None:
    asked = requests(folder, "documents")
    found = AtlasLM(reader, *shape).loglikelihood_rolling(asked, disable_tqdm=True)
    end, encode = reader.tokenizer.eod, reader.tokenizer.encode
    wanted = [plain(reader, [end], encode(row["text"]))[0] for row in DOCUMENTS]
    assert found == pytest.approx(wanted, **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_texts_are_continued_by_their_likeliest_tokens(
    reader: HuggingFaceReader, folder: Path, shape: tuple[int, int]
) -> None:
    asked = requests(folder, "endings")
    found = AtlasLM(reader, *shape).generate_until(asked, disable_tqdm=True)
    assert found == [greedy(reader, request.args[0], 9).partition("\n")[0].partition("q")[0] for request in asked]
    assert len(set(found)) > 1


def greedy(reader: HuggingFaceReader, context: str, most: int) -> str:
    """By a forward over the whole text for every token."""
    tokens = reader.tokenizer.encode(context)
    before = len(tokens)
    while len(tokens) < before + most:
        with torch.no_grad():
            logits = reader._model(torch.tensor([tokens]), use_cache=False).logits[0, -1, : reader.tokenizer.vocab_size]
        if (token := int(logits.argmax())) == reader.tokenizer.eod:
            break
        tokens.append(token)
    return reader.tokenizer.decode(tokens[before:])


def test_a_run_gives_lm_evals_metrics(reader: HuggingFaceReader, folder: Path) -> None:
    results = run(list(KINDS), reader, include_path=folder, segment=20, batch=2)["results"]
    encode, end = reader.tokenizer.encode, reader.tokenizer.eod
    right = 0
    for row in QUESTIONS:
        likely = [plain(reader, *split(reader, row["question"], f" {choice}"))[0] for choice in row["choices"]]
        right += likely.index(max(likely)) == row["answer"]
    assert results["choices"]["acc,none"] == right / len(QUESTIONS)
    nats = sum(plain(reader, [end], encode(row["text"]))[0] for row in DOCUMENTS)
    bits = -nats / math.log(2) / sum(len(row["text"].encode()) for row in DOCUMENTS)
    assert results["documents"]["bits_per_byte,none"] == pytest.approx(bits)
    assert results["endings"]["exact_match,none"] == 0


def test_the_likeliest_continuation_is_known(reader: HuggingFaceReader) -> None:
    context = reader.tokenizer.encode(TEXT)
    best = []
    for _ in range(4):
        with torch.no_grad():
            best.append(int(reader._model(torch.tensor([context + best])).logits[0, -1, :290].argmax()))
    others = [[*best[:place], (best[place] + 1) % 290, *best[place + 1 :]] for place in range(4)]
    (found,) = ask(reader, [Question(context, [best, *others])], segment=10)
    assert [likeliest for _, likeliest in found] == [True, False, False, False, False]
    assert found[0][0] == pytest.approx(plain(reader, context, best)[0])


def test_an_empty_context_is_the_end_of_a_document(reader: HuggingFaceReader) -> None:
    model, encode, end = AtlasLM(reader), reader.tokenizer.encode, reader.tokenizer.eod
    found = model.loglikelihood([instance("", "the text"), instance(" \n", "the text")], disable_tqdm=True)
    wanted = [plain(reader, [end], encode("the text")), plain(reader, [end], encode(" \nthe text"))]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted])
    assert model.loglikelihood_rolling([instance("")], disable_tqdm=True) == [0.0]
    written = model.generate_until([instance("", {"max_gen_toks": 3})], disable_tqdm=True)
    assert written == write(reader, [[end]], Generation(3), [0], 512)


def test_sampled_texts_hang_on_their_seeds_alone(reader: HuggingFaceReader) -> None:
    contexts = [reader.tokenizer.encode(row["question"]) for row in QUESTIONS[:4]]
    how = Generation(6, temperature=1.0, top_p=0.9)
    together = write(reader, contexts, how, [3, 4, 5, 6], 16)
    alone = [write(reader, [context], how, [3 + number], 512)[0] for number, context in enumerate(contexts)]
    assert together == alone
    assert write(reader, contexts[:1], how, [9], 16) != together[:1]


class Counting:
    """A reader whose next token is one more than the last, and the columns that it was given."""

    def __init__(self, reader: HuggingFaceReader, end: int) -> None:
        self.tokenizer = replace(reader.tokenizer, eod=end, encode=lambda text: [ord(c) for c in text])
        self.device, self.columns = torch.device("cpu"), 0

    def forget(self) -> None:
        pass

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        self.columns += tokens.shape[1]
        return torch.nn.functional.one_hot((tokens + 1) % 290, 304).double()


def test_a_text_ends_with_its_document(reader: HuggingFaceReader) -> None:
    counting = Counting(reader, end=104)
    decode = reader.tokenizer.decode
    found = write(counting, [[97, 98], [102], [104]], Generation(4), [0, 0, 0], 512)
    assert found == [decode([99, 100, 101, 102]), decode([103]), decode([105, 106, 107, 108])]


def test_texts_of_like_length_are_continued_together() -> None:
    assert list(alike([5, 90, 7, 95, 6, 60, 99], 2, 10)) == [[6, 3], [1], [5], [2, 4], [0]]


def test_a_context_is_read_once_for_all_its_choices(reader: HuggingFaceReader) -> None:
    counting = Counting(reader, end=200)
    counting.mark, counting.back = lambda: None, lambda mark: None  # type: ignore[attr-defined]
    ask(counting, [Question([1] * 100, [[2, 3], [4, 5], [6, 7]])], segment=32)
    assert counting.columns == 99 + 3 * 2


def test_an_interrupted_run_goes_on(
    reader: HuggingFaceReader, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One batch size: another rounds otherwise, and results are compared to the bit.
    whole = run(list(KINDS), reader, include_path=folder, batch=1)["results"]
    read, reads = HuggingFaceReader.read, []

    def once(self: HuggingFaceReader, tokens: torch.Tensor) -> torch.Tensor:
        reads.append(tokens)
        if len(reads) == 12:
            raise KeyboardInterrupt
        return read(self, tokens)

    monkeypatch.setattr(HuggingFaceReader, "read", once)
    again = {"include_path": folder, "batch": 1, "cache": tmp_path / "answers"}
    with pytest.raises(KeyboardInterrupt):
        run(list(KINDS), reader, **again)
    assert run(list(KINDS), reader, **again)["results"] == whole
    before = len(reads)
    assert run(list(KINDS), reader, **again)["results"] == whole
    assert len(reads) == before


def test_a_tag_is_all_of_its_tasks(reader: HuggingFaceReader, folder: Path, tmp_path: Path) -> None:
    for name in ("choices", "documents"):
        yaml = (folder / f"{name}.yaml").read_text()
        (tmp_path / f"{name}.yaml").write_text(f"tag: both\n{yaml}")
    told = run(["both", "choices"], reader, include_path=tmp_path)
    assert set(harness.of_task(told, "both")["results"]) == {"choices", "documents"}
    assert set(harness.of_task(told, "choices")["results"]) == {"choices"}
    with pytest.raises(ValueError, match="lm-eval measured nothing of endings"):
        harness.of_task(told, "endings")


def test_names_of_theirs_that_are_like_ours_are_known() -> None:
    assert harness.knows("babilong_qa6") and not harness.knows("niah_singel_1")


def test_a_run_of_megatron_answers_alike(saved: Path, reader: HuggingFaceReader, folder: Path) -> None:
    asked = requests(folder, "choices")
    wanted = AtlasLM(reader).loglikelihood(asked, disable_tqdm=True)
    with tiny_run.a_world_that_is_left():
        found = AtlasLM(open_reader(saved / "run"), 3, 20).loglikelihood(asked, disable_tqdm=True)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], rel=1e-5)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `datasets` takes for its cache, which is empty."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "datasets"


@pytest.mark.slow
def test_the_papers_tasks_are_read_from_the_cache(reader: HuggingFaceReader, cache: Path) -> None:
    cached_tasks.put(cache)
    found = run(list(harness.PAPER_TASKS), reader)
    results = found["results"]
    assert set(results) == set(harness.PAPER_TASKS)
    for name in ("lambada_openai", "lambada_standard"):
        total, _ = plain(reader, *split(reader, "the window of", " text"))
        assert results[name]["perplexity,none"] == pytest.approx(math.exp(-total))
    total, _ = plain(reader, [reader.tokenizer.eod], reader.tokenizer.encode(cached_tasks.PAGE))
    bits = -total / math.log(2) / len(cached_tasks.PAGE)
    assert results["wikitext"]["bits_per_byte,none"] == pytest.approx(bits)
    assert found["n-samples"]["boolq"] == {"original": 1, "effective": 1}
    shutil.rmtree(cache / "baber___piqa")
    shutil.rmtree(cache / "aps___super_glue")
    with pytest.raises(ValueError, match=r"^the data of piqa, boolq is not in .*datasets; on a .*--tasks piqa,boolq"):
        run(["swde", "piqa", "boolq"], reader)
    shutil.rmtree(cache / "allenai___ai2_arc/ARC-Easy")
    with pytest.raises(ValueError, match=r"^the data of arc_easy is not in"):
        run(["arc_easy"], reader)


def test_what_a_run_cannot_do_is_one_line(
    reader: HuggingFaceReader, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without lm-eval's own tasks, which take long to look through.
    monkeypatch.setattr(harness, "TaskManager", partial(harness.TaskManager, include_defaults=False))

    def refused(said: str, tasks: tuple[str, ...] = ("choices",), **given: Any) -> None:
        with pytest.raises(ValueError, match=said) as raised:
            run(tasks, reader, **{"include_path": folder, **given})
        assert "\n" not in str(raised.value)

    refused("no task was named; the paper's are wikitext,", tasks=())
    refused("is no folder; give one with the YAML", include_path=folder / "choices.yaml")
    refused("lm-eval knows no task 'choice'; did you mean 'choices'", tasks=("choice",))
    refused("limit=0 must be at least 1 question", limit=0)
    refused("shots=-1 must be 0 or more", shots=-1)
    refused("batch=0 and segment=512 must each be at least 1", batch=0)
    refused("batch=8 and segment=0 must each be at least 1", segment=0)
    yaml = TASK.format(name="broken", folder=tmp_path) + KINDS["documents"][1]
    (tmp_path / "broken.yaml").write_text(yaml)
    broken = {"tasks": ("broken",), "include_path": tmp_path}
    refused("task broken cannot be loaded: Unable to find .*broken.jsonl.*; correct its YAML or its data", **broken)
    (tmp_path / "broken.jsonl").write_text("no JSON")
    refused("task broken cannot be loaded: .*; correct its YAML or its data", **broken)
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}')
    (tmp_path / "broken.yaml").write_text(yaml.replace("test_split: test", "test_split: none"))
    refused("task broken cannot be loaded: .*none.*; correct its YAML or its data", **broken)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_gen_toks": 0}, "max_gen_toks=0 tokens; ask for at least 1"),
        ({"num_beams": 4}, "generates with num_beams, which this model does not offer"),
        ({"do_sample": True, "temperature": 1.0, "top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
    ],
)
def test_options_that_are_not_offered_are_refused(
    reader: HuggingFaceReader, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        AtlasLM(reader).generate_until([instance("the", options)], disable_tqdm=True)


def test_continuations_without_a_token_are_refused(reader: HuggingFaceReader) -> None:
    with pytest.raises(ValueError, match="asks for an empty continuation of 'the memory'"):
        AtlasLM(reader).loglikelihood([instance("the memory", "")], disable_tqdm=True)
    assert len(reader.tokenizer.encode("a")) == len(reader.tokenizer.encode("at")) == 1
    with pytest.raises(ValueError, match="continuation 't' of 'a' melts into the context's last token"):
        AtlasLM(reader).loglikelihood([instance("a", "t")], disable_tqdm=True)


def test_without_lm_eval_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, harness.__name__)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=r"need the lm-eval package .* pip install -e '\.\[eval\]' -c constraints"):
        importlib.import_module(harness.__name__)


def test_a_kept_answer_runs_nothing() -> None:
    ran: list[str] = []

    class Payload:
        def __reduce__(self) -> Any:
            return ran.append, ("ran",)

    assert harness._plain(pickle.dumps((-1.5, True))) == (-1.5, True)
    for raw in (pickle.dumps(Payload()), b"", b"no pickle"):
        with pytest.raises(ValueError, match="a kept answer cannot be read"):
            harness._plain(raw)
    assert not ran
