"""Text, answers and indexed data become sequences; what cannot be learned from is refused with its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from atlas_megatron.commands import prepare_data
from atlas_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from atlas_megatron.finetune.examples import Loader, collate
from atlas_megatron.finetune.segments import IGNORED
from atlas_megatron.finetune.settings import Settings
from atlas_megatron.hf.configuration_atlas import AtlasConfig
from tests.support import exported_models as exported

CONFIG = AtlasConfig(vocab_size=exported.VOCABULARY, seq_length=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, as a model's."""
    root = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["".join(exported.LINES)], exported.VOCABULARY, root)
    return root


def loader(folder: Path, **given: object) -> Loader:
    return Loader(Settings(folder, (), folder / "out", **given), CONFIG)  # type: ignore[arg-type]


def test_text_is_cut_into_pieces_of_which_all_but_the_first_token_is_learned(folder: Path, tmp_path: Path) -> None:
    file, tokenizer = exported.text(tmp_path), load_tokenizer(folder)
    found = loader(folder).load([str(file)])
    ids = [*tokenizer.encode(file.read_text()), tokenizer.eod]
    assert (found.sequences, found.longest) == (len(ids) // 64, 64)
    assert found.tokens == found.sequences * 64
    batch = collate([found.dataset[0], found.dataset[1]])
    assert batch["input_ids"].tolist() == [ids[:64], ids[64:128]]
    assert batch["labels"].tolist() == [[IGNORED, *ids[1:64]], [IGNORED, *ids[65:128]]]


def test_of_an_answer_only_the_answer_is_learned(folder: Path, tmp_path: Path) -> None:
    file, tokenizer = tmp_path / "tasks.jsonl", load_tokenizer(folder)
    records = [
        {"input": "a sheep went", "question": "who?", "target": "a sheep"},
        {"input": "nobody went over the hill", "question": "who went?", "target": "nobody"},
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    found = loader(folder, prompt="{input} # {question} = ").load([str(file)])
    batch = collate([found.dataset[0], found.dataset[1]])
    assert batch["input_ids"].shape == batch["labels"].shape and len(batch["labels"]) == found.sequences == 2
    for row, (record, labels) in enumerate(zip(records, batch["labels"], strict=True)):
        learned = labels != IGNORED
        assert tokenizer.decode(labels[learned].tolist()) == record["target"] + "<|endoftext|>"
        prompt = tokenizer.decode(batch["input_ids"][row, : int(learned.int().argmax())].tolist())
        assert prompt == f"{record['input']} # {record['question']} = "
        assert torch.equal(batch["input_ids"][row][learned], labels[learned])


def test_prepared_data_are_read_where_they_lie(folder: Path, tmp_path: Path) -> None:
    file, tokenizer = exported.text(tmp_path), load_tokenizer(folder)
    out = tmp_path / "data"
    words = [str(file), "--out", str(out), "--tokenizer", str(folder), "--validation", "0", "--workers", "1"]
    assert prepare_data.main(words) == 0
    whole = [*tokenizer.encode(file.read_text()), tokenizer.eod]
    for word in (f"{out}/train", f"{out}/train.bin"):
        found = loader(folder).load([word])
        read = torch.cat([collate([found.dataset[n]])["input_ids"][0] for n in range(found.sequences)])
        assert read.tolist() == whole[: len(read)] and len(whole) - len(read) < 64
    both = loader(folder).load([f"{out}/train", str(exported.answers(tmp_path))])
    assert both.sequences == found.sequences + 12

    other = tmp_path / "other"
    train_tokenizer(["".join(exported.LINES)], exported.VOCABULARY - 2, other)
    with pytest.raises(ValueError, match="prepared with a tokenizer of 272 tokens, and that of the model has 270"):
        loader(other).load([f"{out}/train"])
    (out / "train.bin").write_bytes((out / "train.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match="truncated"):
        loader(folder).load([f"{out}/train"])


BROKEN = {
    "no target's text": ('{"input": "a", "question": "b", "target": 3}', "line 1: 'target' holds int, not text"),
    "a field missing": ('{"input": "a", "target": "b"}', "line 1: 'question' holds nothing.*--prompt"),
    "no JSON": ('{"input": "a", "question": "b", "target": "c"}\n{"inp', "line 2: not JSON"),
    "no object": ('{"input": "a", "question": "b", "target": "c"}\n[1]', "line 2: expected an object, found list"),
    "no text": ('{"words": "a"}', "no key 'text' but words"),
    "too short": ('{"text": "a"}', "no sequence of 64 tokens in it"),
    "blank": ("\n \n", "no sequence of 64 tokens in it"),
    "empty": ("", "is empty"),
}


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_broken_data_are_refused(folder: Path, tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=said):
        loader(folder).load([str(file)])


def test_what_is_too_long_is_not_cut_off(folder: Path, tmp_path: Path) -> None:
    file = exported.answers(tmp_path)
    with pytest.raises(ValueError, match="line 1: prompt and answer have .* tokens, more than --length 20"):
        loader(folder, length=20).load([str(file)])


def test_a_tokenizer_has_to_fit(folder: Path, tmp_path: Path) -> None:
    small = AtlasConfig(vocab_size=200)
    with pytest.raises(ValueError, match="has 272 tokens, more than the model's 200"):
        Loader(Settings(folder, (), tmp_path), small)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    for file in bare.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="is text, and .* holds no tokenizer"):
        loader(bare).load([str(exported.text(tmp_path))])
