"""What a tokenizer's folder declares beside its vocabulary: the token that ends a document, and tokens added later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"
# Names that tokenizers in the wild give their end-of-document token, tried in this order when no file declares one.
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# The files of a tokenizer's folder, whichever library made it.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
# Files of a model that name the end by its number.
BY_NUMBER = ("generation_config.json", "config.json")


def end_of_document(folder: Path, vocabulary: Mapping[str, int]) -> int:
    """The id of the token that ends a document, as transformers finds it.

    special_tokens_map.json goes before tokenizer_config.json unless the latter lists its tokens. Then follow
    generation_config.json and config.json with the first of their `eos_token_id`, and at last a known name.
    Raises ValueError where a declared token is not in the vocabulary, or there is none.
    """
    config, special = read_object(folder / CONFIG), read_object(folder / SPECIAL)
    ordered = (config, special) if "added_tokens_decoder" in config else (special, config)
    for said in ordered:
        named = said.get("eos_token")
        if named is not None:
            name = named.get("content") if isinstance(named, dict) else named
            if not isinstance(name, str) or name not in vocabulary:
                raise ValueError(no_end(folder))
            return vocabulary[name]
    file, number = _by_number(folder)
    if file:
        if number not in vocabulary.values():
            raise ValueError(f"{folder / file} says eos_token_id {number}, which is no token; correct the file")
        return number
    for name in KNOWN_ENDS:
        if name in vocabulary:
            return vocabulary[name]
    raise ValueError(no_end(folder))


def carried(folder: Path) -> dict[str, bytes]:
    """The content of the files, by their names, that make another folder the same tokenizer.

    Where a model's file names the end by its number, generation_config.json does so there.
    """
    known = [folder / name for name in TOKENIZER_FILES]
    files = {file.name: file.read_bytes() for file in known if file.is_file()}
    file, number = _by_number(folder)
    named = [read_object(folder / name).get("eos_token") for name in (CONFIG, SPECIAL)]
    if files and file and named == [None, None]:
        files[BY_NUMBER[0]] = json.dumps({"eos_token_id": number}).encode()
    return files


def _by_number(folder: Path) -> tuple[str, int]:
    """The first file that names the end by its number, and the number; an empty name where none does."""
    for file in BY_NUMBER:
        number = read_object(folder / file).get("eos_token_id")
        first = number[0] if isinstance(number, list) and number else number
        if type(first) is int:
            return file, first
    return "", -1


def added_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    """The tokens that tokenizer_config.json and added_tokens.json list, by their ids, as arguments of an AddedToken."""
    found: dict[int, dict[str, Any]] = {}
    listed = read_object(folder / CONFIG).get("added_tokens_decoder")
    for number, token in (listed if isinstance(listed, dict) else {}).items():
        if not (str(number).isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)):
            raise ValueError(f"{folder / CONFIG}: added_tokens_decoder holds {number!r}: {token!r}; restore the file")
        flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        found[int(number)] = {name: token[name] for name in flags if name in token}
    for content, number in read_object(folder / ADDED).items():
        if type(number) is not int or number < 0:
            raise ValueError(f"{folder / ADDED} gives {content!r} the id {number!r}; restore the file")
        found.setdefault(number, {"content": content})
    return found


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file. Raises ValueError where it is none."""
    if not file.is_file():
        return {}
    try:
        said = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file} is not a JSON object ({error}); restore the file") from error
    if not isinstance(said, dict):
        raise ValueError(f"{file} is not a JSON object but {type(said).__name__}; restore the file")
    return said


def no_end(folder: Path) -> str:
    return (
        f"tokenizer {folder} names no end-of-document token that its vocabulary holds; "
        f'add "eos_token" to its {CONFIG}'
    )
