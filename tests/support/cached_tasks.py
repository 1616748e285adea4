"""The data sets of the paper's tasks, a row each, as a local cache of `datasets` holds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets

from atlas_megatron.evaluate import harness

PAGE = "the memory learns at test time what the window of the text says. "
QUESTION = {"question": "the memory?", "choices": {"text": ["at", "what"], "label": ["A", "B"]}, "answerKey": "B"}
VALUE = {"text": PAGE + "Time:", "value": "test"}
ROWS: dict[tuple[str, str], dict[str, Any]] = {
    ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"): {"page": PAGE},
    ("EleutherAI/lambada_openai", "default"): {"text": "the window of text"},
    ("cimec/lambada", "plain_text"): {"text": "the window of text"},
    ("baber/piqa", "default"): {"goal": "read", "sol1": "the text", "sol2": "the window", "label": 0},
    ("Rowan/hellaswag", "default"): {
        "activity_label": "read", "ctx_a": "the text", "ctx_b": "says", "endings": ["a", "b", "c", "d"], "label": "2"
    },
    ("allenai/winogrande", "winogrande_xl"): {
        "sentence": "the text says what _ reads", "option1": "it", "option2": "time", "answer": "1"
    },
    ("allenai/ai2_arc", "ARC-Easy"): QUESTION,
    ("allenai/ai2_arc", "ARC-Challenge"): QUESTION,
    ("lighteval/siqa", "default"): {
        "context": "it reads", "question": "what?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "1"
    },
    ("aps/super_glue", "boolq"): {"passage": PAGE, "question": "is it so", "label": 1},
    ("hazyresearch/based-swde-v2", "default"): VALUE,
    ("hazyresearch/based-fda", "default"): VALUE,
    ("hazyresearch/based-squad", "default"): VALUE,
}  # fmt: skip


def put(cache: Path) -> None:
    """Lay them all where `datasets` keeps what it has downloaded, the row in each split."""
    for (name, config), row in ROWS.items():
        _put(cache, name, config, row)


def _put(cache: Path, name: str, config: str, row: dict[str, Any]) -> None:
    source, splits = cache.parent / "row.jsonl", ("train", "validation", "test")
    source.write_text(json.dumps(row))
    with harness._offline():
        datasets.load_dataset("json", data_files=dict.fromkeys(splits, str(source)), cache_dir=str(cache))
    (made,) = (cache / "json").glob("*/*/*/dataset_info.json")
    place = cache / name.replace("/", "___") / config / "0.0.0" / "a1b2"
    place.mkdir(parents=True)
    said, stem = json.loads(made.read_text()), name.split("/")[1]
    said |= {"config_name": config, "dataset_name": stem, "builder_name": "parquet"}
    for split in splits:
        said["splits"][split]["dataset_name"] = stem
        shutil.copyfile(made.with_name(f"json-{split}.arrow"), place / f"{stem}-{split}.arrow")
    (place / "dataset_info.json").write_text(json.dumps(said))
    shutil.rmtree(cache / "json")
