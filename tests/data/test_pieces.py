"""Long texts through tokenizers of several kinds: pieces have the tokens of the whole, characters stay whole."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from atlas_megatron.data import pieces as module
from atlas_megatron.data.pieces import Spoken, pieces
from atlas_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

ENGLISH = "The naïve café reads, and writes: one token after another!\n\n  def read(self): return 12.5 \t# done\r\n" * 9
CHINESE = "记忆在阅读时学习。它每次写入一个记号，然后再读出来！后来呢？没有人知道。\n" * 40
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def llama(folder: Path, *, prepends: bool) -> Tokenizer:
    """Of Llama's kind: bytes for what it does not know, words with their space; prepends: one before each text."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if prepends:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trained_on = [word for word in ENGLISH.split()] * 3
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trained_on = [ENGLISH]
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *BYTES]
    backend.train_from_iterator(
        trained_on, trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False)
    )
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def unigram(folder: Path) -> Tokenizer:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([ENGLISH, CHINESE], trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("kinds")
    train_tokenizer([ENGLISH], 300, root / "bytes")
    return {
        "bytes": load_tokenizer(root / "bytes"),
        "llama": llama(root / "llama", prepends=False),
        "llama2": llama(root / "llama2", prepends=True),
        "unigram": unigram(root / "unigram"),
    }


@pytest.mark.parametrize("kind", ["bytes", "llama", "llama2", "unigram"])
@pytest.mark.parametrize("text", [ENGLISH, CHINESE, ENGLISH + CHINESE], ids=["spaces", "no spaces", "both"])
def test_text_in_pieces_is_tokens_of_the_whole(
    kinds: dict[str, Tokenizer], kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 100)
    encode = kinds[kind].encode
    parts = list(pieces(io.StringIO(text, newline=""), encode))
    # Of Chinese a tokenizer that writes a space before each text offers no place.
    assert len(parts) > (5 if "bytes" in kind or text != CHINESE else 0)
    assert [token for part in parts for token in encode(part)] == encode(text)


def test_without_a_tokenizer_the_pieces_are_the_text(
    monkeypatch: pytest.MonkeyPatch, kinds: dict[str, Tokenizer]
) -> None:
    monkeypatch.setattr(module, "BLOCK", 100)
    parts, encode = list(pieces(io.StringIO(ENGLISH, newline=""))), kinds["bytes"].encode
    assert len(parts) > 5 and "".join(parts) == ENGLISH
    assert [token for part in parts for token in encode(part)] == encode(ENGLISH)


def test_a_text_that_offers_no_place_is_cut_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 100)
    monkeypatch.setattr(module, "LONGEST_UNCUT", 500)
    parts = list(pieces(io.StringIO("A" * 2345), lambda text: [len(text)]))
    assert "".join(parts) == "A" * 2345 and max(map(len, parts)) <= 600


@pytest.mark.parametrize("kind", ["bytes", "llama", "llama2"])
def test_text_is_given_out_in_whole_characters(kinds: dict[str, Tokenizer], kind: str) -> None:
    for text in ("the naïve café — 東京 🙂🙂 end", "日本日本", "🙂 🙂", "a日"):
        ids, spoken = kinds[kind].encode(text), Spoken(kinds[kind])
        said = [spoken.add(token) for token in ids]
        assert "".join(said) == kinds[kind].decode(ids) == text and spoken.rest() == ""
        assert not any("\N{REPLACEMENT CHARACTER}" in part for part in said)
        assert "" in said  # a character of several bytes is several tokens here


@pytest.mark.parametrize("kind", ["bytes", "llama"])
def test_what_is_no_text_is_given_out_too(kinds: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    face = tokenizer.encode("🙂")[-4:]
    spoken = Spoken(tokenizer)
    said = "".join(spoken.add(token) for token in [*tokenizer.encode("the"), face[2], *face, *tokenizer.encode(" end")])
    assert said == "the\N{REPLACEMENT CHARACTER}🙂 end"
    assert [spoken.add(token) for token in face[:3]] == ["", "", ""]
    assert set(spoken.rest()) == {"\N{REPLACEMENT CHARACTER}"} and spoken.rest() == ""
    draw = random.Random(0)
    for token in draw.choices(range(tokenizer.vocab_size), k=300):
        spoken.add(token)
        assert len(spoken._pending) <= 4  # nothing is held back for long


def test_tokens_that_hold_the_end_of_one_character_and_the_start_of_the_next(tmp_path: Path) -> None:
    text = "日本日本日本"
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)[0][0]
    vocabulary = {"<|endoftext|>": 0} | {letter: n + 1 for n, letter in enumerate(sorted(set(letters)))}
    merges = []
    for place in range(1, len(letters) - 1, 2):
        pair = letters[place] + letters[place + 1]
        if pair not in vocabulary:
            vocabulary[pair] = len(vocabulary)
            merges.append((letters[place], letters[place + 1]))
    backend = Backend(models.BPE(vocabulary, merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids, spoken = tokenizer.encode(text), Spoken(tokenizer)
    said = [spoken.add(token) for token in ids]
    assert len(ids) < len(letters), json.dumps(ids)
    assert "".join(said) == text and said.count("") < len(said) - 2
