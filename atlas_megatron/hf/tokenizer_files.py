"""A tokenizer on its way between a run and a Hugging Face folder, and what transformers is told of it there."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas_megatron.data.declared_tokens import BY_NUMBER, CONFIG, SPECIAL, TOKENIZER_FILES, carried, read_object
from atlas_megatron.data.tokenizer import Tokenizer, has_tokenizer_json, load_tokenizer, write_converted

VOCABULARY = "tokenizer.json"
# Tokens that a folder may name; transformers would give a new number to one that the vocabulary lacks.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OF_ANOTHER_MODEL = ("model_max_length", "max_length", "auto_map", "name_or_path")


@dataclass(frozen=True)
class Specials:
    """Numbers of the tokens that a model's configuration names."""

    end: int
    padding: int


def copy_tokenizer(source: Path, target: Path, vocab_size: int) -> int | None:
    """Copy the tokenizer's files, if there are any; its end-of-document token.

    Raises ValueError where it has more tokens than the model.
    """
    files = carried(source)
    if not files:
        return None
    tokenizer = _fitting(source, vocab_size)
    target.mkdir(exist_ok=True)
    for name, content in files.items():
        (target / name).write_bytes(content)
    return tokenizer.eod


def export_tokenizer(source: Path, target: Path, vocab_size: int) -> Specials | None:
    """Write the tokenizer, if there is any, so that AutoTokenizer reads and pads as the model wants it.

    Its chat template and its special tokens stay. Padding is on the left, by the end token where it has none of its
    own. What tells of another model goes: a longest input, code of its own, truncation, padding and dropout that its
    tokenizer.json remembers. Raises ValueError where it has more tokens than the model.
    """
    if not any((source / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer = _fitting(source, vocab_size)
    if has_tokenizer_json(source):
        copy_tokenizer(source, target, vocab_size)
        # The end is named by its text below, and by the model's own configuration.
        (target / BY_NUMBER[0]).unlink(missing_ok=True)
    else:
        write_converted(tokenizer, target)
        for name in ("chat_template.jinja", SPECIAL):
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
    vocabulary = _forget(target / VOCABULARY)
    end = next(token for token, number in vocabulary.items() if number == tokenizer.eod)
    said, special = read_object(target / CONFIG), read_object(target / SPECIAL)
    named = {name: _content(said.get(name) or special.get(name)) for name in NAMED}
    named = {name: token for name, token in named.items() if token in vocabulary}
    named |= {"eos_token": end, "pad_token": named.get("pad_token", end)}
    # tokenizer_class: the one that takes tokenizer.json as it is, and so gives the numbers that were trained on.
    told = named | {"padding_side": "left", "tokenizer_class": "PreTrainedTokenizerFast"}
    for names in (said, special):
        for name in (*NAMED, *OF_ANOTHER_MODEL):
            names.pop(name, None)
    _write(target / CONFIG, said | told)
    if (target / SPECIAL).is_file():
        _write(target / SPECIAL, special | named)
    return Specials(tokenizer.eod, vocabulary[named["pad_token"]])


def _fitting(source: Path, vocab_size: int) -> Tokenizer:
    tokenizer = load_tokenizer(source)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer in {source} has {tokenizer.vocab_size} tokens, more than the model's vocab_size="
            f"{vocab_size}; give the tokenizer that the model was trained with"
        )
    return tokenizer


def _forget(file: Path) -> dict[str, int]:
    """Take out of a tokenizer.json what it remembers of other uses; its vocabulary, later tokens included."""
    from tokenizers import Tokenizer as Backend

    said = json.loads(file.read_text(encoding="utf-8-sig"))
    kept = dict(said) | {"truncation": None, "padding": None}
    kept["model"] = dict(said["model"]) | {name: None for name in ("dropout",) if said["model"].get(name) is not None}
    if kept != said:
        file.write_text(json.dumps(kept, ensure_ascii=False, indent=2), encoding="utf-8")
    return Backend.from_file(str(file)).get_vocab(with_added_tokens=True)


def _content(token: Any) -> Any:
    """A token as its text, however a file writes it."""
    return token.get("content") if isinstance(token, dict) else token


def _write(file: Path, said: dict[str, Any]) -> None:
    file.write_text(json.dumps(said, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
