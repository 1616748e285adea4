"""Answers and chats become the ids of the exported tokenizer, and of them the answers are learned."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoTokenizer

from atlas_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from atlas_megatron.finetune.examples import Loader, collate
from atlas_megatron.finetune.plan import plan
from atlas_megatron.finetune.segments import IGNORED
from atlas_megatron.finetune.settings import Settings
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from tests.support import exported_models as exported

SPECIAL = ["<|start|>", "<|user|>", "<|bot|>", "<|end|>"]
CONFIG = AtlasConfig(vocab_size=exported.VOCABULARY + len(SPECIAL), seq_length=16)
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('system is late') }}"
    "{% endif %}{{ '<|user|>' if m['role'] == 'user' else '<|bot|>' }}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "how many sheep?"},
    {"role": "assistant", "content": "3 sheep"},
    {"role": "user", "content": "and goats?"},
    {"role": "assistant", "content": "4 goats"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with special tokens, one of which it writes before every text, and a chat template."""
    root = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["".join(exported.LINES)], exported.VOCABULARY, root)
    backend = Backend.from_file(str(root / "tokenizer.json"))
    backend.add_special_tokens(SPECIAL)
    start = ("<|start|>", backend.token_to_id("<|start|>"))
    backend.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[start])
    backend.enable_truncation(max_length=3)
    backend.save(str(root / "tokenizer.json"))
    (root / "chat_template.jinja").write_text(TEMPLATE)
    return root


def loader(folder: Path, **given: object) -> Loader:
    return Loader(Settings(folder, (), folder / "out", **given), CONFIG)  # type: ignore[arg-type]


def write(file: Path, *records: object) -> str:
    file.write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, records)).encode())
    return str(file)


def learned(folder: Path, found: object, row: int = 0) -> tuple[str, str]:
    """What is read in words, and what of it is learned."""
    decode = load_tokenizer(folder).decode
    batch = collate([found.dataset[row]])  # type: ignore[attr-defined]
    labels = batch["labels"][0]
    return decode(batch["input_ids"][0].tolist()), decode(labels[labels != IGNORED].tolist())


def test_a_prompt_has_the_ids_of_the_exported_tokenizer(folder: Path, tmp_path: Path) -> None:
    record = {"meta": {"input": "how many sheep?"}, "target": "3 sheep"}
    file = write(tmp_path / "qa.json", record)
    found = loader(folder, prompt="<|user|>{meta.input}<|bot|>").load([file])
    ids, unlearned = found.dataset[0]
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ids[:unlearned].tolist() == theirs("<|user|>how many sheep?<|bot|>", truncation=False).input_ids
    assert learned(folder, found)[1] == "3 sheep<|endoftext|>"


def test_what_a_record_spells_like_a_special_token_is_text(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "qa.jsonl", {"input": "a<|end|><|bot|>b", "target": "<|end|>c"})
    found = loader(folder, prompt="<|user|>{input}\n<|bot|>").load([file])
    ids = found.dataset[0][0].tolist()
    special = [load_tokenizer(folder).decode([token]) for token in ids if token >= exported.VOCABULARY]
    assert special == ["<|start|>", "<|user|>", "<|bot|>"]
    assert learned(folder, found) == (
        "<|start|><|user|>a<|end|><|bot|>b\n<|bot|><|end|>c<|endoftext|>",
        "<|end|>c<|endoftext|>",
    )


def test_of_a_chat_the_turns_of_the_assistant_are_learned(folder: Path, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": CHAT}] * 2), tmp_path / "chats.parquet")
    packed = tmp_path / "chats.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"messages": CHAT}).encode()))
    found = loader(folder).load([str(tmp_path / "chats.parquet"), str(packed)])
    theirs = AutoTokenizer.from_pretrained(folder)
    text = theirs.apply_chat_template(CHAT, tokenize=False)
    whole = theirs(text, add_special_tokens=False, truncation=False).input_ids
    assert found.sequences == 3
    for row in range(3):
        assert found.dataset[row][0].tolist() == whole
        assert learned(folder, found, row) == (text, "3 sheep<|end|>\n4 goats<|end|>\n")


def test_a_template_may_say_itself_what_is_generated_and_an_end_is_added_where_it_writes_none(
    folder: Path, tmp_path: Path
) -> None:
    marked = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}Q: {{ m['content'] }} A: {% endif %}{% endfor %}"
    )
    plain = marked.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    try:
        for template in (marked, plain):
            (folder / "chat_template.jinja").write_text(template)
            found = loader(folder).load([write(tmp_path / "chats.jsonl", {"messages": CHAT})])
            text = "Q: how many sheep? A: 3 sheepQ: and goats? A: 4 goats<|endoftext|>"
            assert learned(folder, found) == (text, "3 sheep4 goats<|endoftext|>")
    finally:
        (folder / "chat_template.jinja").write_text(TEMPLATE)


BAD = {
    "no list": ({"messages": "hello"}, "line 1: 'messages' holds no list of turns"),
    "no turn": ({"messages": [{"role": "user"}]}, "line 1: turn 1 is not"),
    "no answer": ({"messages": CHAT[:1]}, "line 1: no turn of the assistant"),
    "refused": ({"messages": [*CHAT, {"role": "system", "content": "x"}]}, "template refuses it .system is late"),
    "too long": ({"messages": CHAT * 9}, "line 1: the chat has .* tokens, more than --length 100"),
    "no Unicode": ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "'messages' is not valid Unicode"),
}


@pytest.mark.parametrize(("record", "said"), BAD.values(), ids=BAD)
def test_bad_chats_are_named_and_left_out_where_asked(
    folder: Path, tmp_path: Path, record: dict[str, object], said: str
) -> None:
    file = write(tmp_path / "chats.jsonl", record, {"messages": CHAT}, {"input": "a", "target": "b"}, 7)
    with pytest.raises(ValueError, match=said):
        loader(folder, length=100).load([file])
    going_past = loader(folder, length=100, skip_bad=True)
    assert going_past.load([file]).sequences == 1
    assert going_past.skipped is not None and going_past.skipped.count == 3
    assert f"{file}, line 4: expected an object" in str(going_past.skipped)


def test_a_chat_needs_a_template(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "chats.jsonl", {"messages": CHAT})
    (folder / "chat_template.jinja").unlink()
    try:
        with pytest.raises(ValueError, match="line 1 is a chat, and .* no chat template; put its chat_template"):
            loader(folder).load([file])
    finally:
        (folder / "chat_template.jinja").write_text(TEMPLATE)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m['role']", "the chat template in .* is none .*, line 1.; mend its chat_template"),
        ("{{ 1 / 0 }}", "line 1: the chat template refuses it .division by zero.; mend or remove it"),
        ("{{ messages[0].nothing.more }}", "line 1: the chat template refuses it .*no attribute 'nothing'"),
    ],
)
def test_a_broken_template_is_named(folder: Path, tmp_path: Path, template: str, said: str) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    (own / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=said):
        loader(own).load([write(tmp_path / "chats.jsonl", {"messages": CHAT})])


def test_where_all_records_are_bad_the_first_is_named(folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "chats.jsonl", {"messages": [{"role": "system", "content": "be kind"}]})
    with pytest.raises(ValueError, match="nothing is left to learn from after 1 bad records.* no turn of the"):
        loader(folder, skip_bad=True).load([file])
    with pytest.raises(ValueError, match="line 1: prompt and answer are empty; remove it"):
        bare = shutil.copytree(folder, tmp_path / "bare")
        backend = Backend.from_file(str(bare / "tokenizer.json"))
        backend.post_processor = processors.TemplateProcessing(single="$A")
        backend.save(str(bare / "tokenizer.json"))
        loader(bare, prompt="").load([write(tmp_path / "empty.jsonl", {"target": ""})])


def test_text_under_a_nested_key_long_documents_and_bad_lines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atlas_megatron.data.corpus.HELD", 50)
    monkeypatch.setattr("atlas_megatron.data.pieces.BLOCK", 40)
    tokenizer = load_tokenizer(folder)
    text = "".join(exported.LINES[:9])
    (tmp_path / "long.txt").write_text(text)
    found = loader(folder).load([str(tmp_path / "long.txt")])
    ids = [token for row in range(found.sequences) for token in found.dataset[row][0]]
    assert ids == [*tokenizer.encode(text), tokenizer.eod][: len(ids)] and len(ids) > 100
    file = write(tmp_path / "a.ndjson", {"meta": {"text": text}}, {"meta": 3}, {"meta": {"text": text}})
    going_past = loader(folder, key="meta.text", skip_bad=True)
    assert going_past.load([file]).sequences == 2 * (len(ids) + 15) // 16 or going_past.skipped
    assert going_past.skipped is not None and going_past.skipped.count == 1


def test_an_empty_validation_is_said_before_the_data_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "short.jsonl", {"text": "short"})
    monkeypatch.setattr("atlas_megatron.finetune.plan.check", lambda *_: None)
    monkeypatch.setattr("atlas_megatron.finetune.plan.read_model", lambda _: CONFIG)
    settings = Settings(folder, (str(tmp_path / "there is none.txt"),), tmp_path / "out", validation=(file,))
    with pytest.raises(ValueError, match="short.jsonl: no sequence of 16 tokens in it"):
        plan(settings, 1)
