"""Contexts have exactly the length that was asked for, in bounded pieces, the same at every call."""

import itertools

import numpy as np
import pytest

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate.filler import TextFolder, repeated, sentences
from atlas_megatron.evaluate.haystack import PIECE, Haystack, Needle, Stretch, encode


def counting(lengths: tuple[int, ...]):
    """Filler whose sentences have these lengths in turn; its tokens count up from 0."""

    def stretches():
        start = 0
        for length in itertools.cycle(lengths):
            yield Stretch(np.arange(start, start + length, dtype=np.int32), np.array([length]))
            start += length

    return stretches


def whole(haystack: Haystack) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int32), *haystack.pieces()])


NEEDLES = tuple(Needle(np.full(3, -number, np.int32), depth) for number, depth in enumerate((0, 0.5, 0.5, 1), start=1))


@pytest.mark.parametrize("length", [14, 15, 17, 18, 19, 20, 63, 1000, PIECE, PIECE + 1])
def test_length_is_exact_and_needles_lie_whole_at_borders(length: int) -> None:
    opening = np.array([-9, -9], np.int32)
    haystack = Haystack(opening, NEEDLES, counting((4, 1, 7)), length)
    pieces = list(haystack.pieces())
    assert all(piece.dtype == np.int32 and 0 < len(piece) <= PIECE for piece in pieces)
    tokens = np.concatenate(pieces)
    assert len(tokens) == length
    assert list(tokens[:2]) == [-9, -9]
    # The filler is there from its start, in order, and every needle whole.
    assert np.array_equal(tokens[tokens >= 0], np.arange(length - 14))
    borders = {0, *np.cumsum(np.tile([4, 1, 7], length))}
    for number in range(1, 5):
        (places,) = np.nonzero(tokens == -number)
        assert len(places) == 3 and places[2] - places[0] == 2
        before = int((tokens[: places[0]] >= 0).sum())
        assert before in borders
        due = int(NEEDLES[number - 1].depth * (length - 14))
        after = [border for border in borders if due <= border <= length - 14]
        assert before == (min(after) if after else max(border for border in borders if border <= length - 14))


def test_depths_are_of_the_whole_context() -> None:
    haystack = Haystack(np.zeros(10, np.int32), NEEDLES, counting((1,)), 122)
    assert haystack.depths == (10 / 122, 63 / 122, 66 / 122, 119 / 122)
    tokens = whole(haystack)
    assert [int(np.nonzero(tokens == -number)[0][0]) for number in range(1, 5)] == [10, 63, 66, 119]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="context of 13 tokens is too short for its 14"):
        Haystack(np.zeros(2, np.int32), NEEDLES, counting((1,)), 13)
    with pytest.raises(ValueError, match="rising order"):
        Haystack(np.zeros(2, np.int32), NEEDLES[::-1], counting((1,)), 100)


def test_positions_pass_32_bits() -> None:
    """The places of a context of 10^12 tokens are counted in Python's integers; its start is there at once."""
    haystack = Haystack(np.zeros(0, np.int32), NEEDLES, counting((4,)), 10**12)
    assert haystack.filler_length == 10**12 - 12
    assert haystack.depths[1] == pytest.approx(0.5)
    assert list(next(haystack.pieces())[:5]) == [-1, -1, -1, 0, 1]


def test_a_folder_is_read_in_order_and_over_again(folder: TextFolder, tokenizer: Tokenizer) -> None:
    total = sum(len(encode(tokenizer, f" {text}")) for text in all_sentences(folder))
    filler = folder.filler((1, 2))
    tokens = whole(Haystack(np.empty(0, np.int32), (), filler, 2 * total + 5))
    assert np.array_equal(tokens[:total], tokens[total : 2 * total])
    assert np.array_equal(tokens[:5], tokens[2 * total :])
    assert sorted(tokenizer.decode(tokens[:total]).split()) == sorted(" ".join(all_sentences(folder)).split())
    assert np.array_equal(whole(Haystack(np.empty(0, np.int32), (), filler, 100)), tokens[:100])
    other = whole(Haystack(np.empty(0, np.int32), (), folder.filler((1, 3)), 100))
    assert not np.array_equal(other, tokens[:100])


def all_sentences(folder: TextFolder) -> list[str]:
    return [text for file in sorted(folder.folder.iterdir()) for text in sentences(file.read_text())]


def test_blocks_lose_no_text(tmp_path, tokenizer: Tokenizer) -> None:
    """A file of several blocks, with characters of several bytes and without white space over a border."""
    text = "".join(f"línea{number} ünd wörd. " for number in range(6000)) + "é" * 70_000 + " end."
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    folder = TextFolder(tmp_path, tokenizer)
    blocks = [folder._block(number) for number in range(len(folder._places))]
    assert len(blocks) > 3
    found = tokenizer.decode(np.concatenate([block.tokens for block in blocks]))
    assert found.replace(" ", "") == text.replace(" ", "")


def test_old_blocks_are_forgotten(texts, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atlas_megatron.evaluate.filler.KEPT", 40_000)
    folder = TextFolder(texts, tokenizer)
    filler = folder.filler((0,))
    for stretch in itertools.islice(filler(), 12):
        assert len(stretch.tokens) > 0
        assert sum(len(block.tokens) for block in folder._blocks.values()) == folder._kept <= 40_000


def test_bad_folders_are_refused(tmp_path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        TextFolder(tmp_path / "none", tokenizer)
    (tmp_path / "data.bin").write_bytes(b"text it is not.")
    (tmp_path / "white.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match=r"holds no UTF-8 text in files named \*.txt"):
        TextFolder(tmp_path, tokenizer)
    (tmp_path / "latin.txt").write_bytes("Ein Wörtchen.".encode("latin-1"))
    with pytest.raises(ValueError, match=r"holds no UTF-8 text in"):
        TextFolder(tmp_path, tokenizer)
    # Beyond the first block too, and before hours of reading, not in them.
    (tmp_path / "long.txt").write_bytes(b"Some words. " * 6000 + b"\xc3")
    (tmp_path / "good.txt").write_text("Ein Wörtchen.")
    assert TextFolder(tmp_path, tokenizer).left_out == [tmp_path / "latin.txt", tmp_path / "long.txt"]


def test_hidden_files_are_left_out_and_the_fingerprint_tells_files_apart(tmp_path, tokenizer: Tokenizer) -> None:
    (tmp_path / "in" / ".hidden").mkdir(parents=True)
    (tmp_path / "in" / "seen.txt").write_text("This is seen.")
    before = TextFolder(tmp_path, tokenizer)
    (tmp_path / "in" / ".hidden" / "not.txt").write_text("This is not.")
    (tmp_path / ".not.md").write_text("This is not.")
    again = TextFolder(tmp_path, tokenizer)
    assert again.fingerprint == before.fingerprint
    tokens = whole(Haystack(np.empty(0, np.int32), (), again.filler((0,)), 100))
    assert (" This is seen." * 100).startswith(tokenizer.decode(tokens))
    (tmp_path / "in" / "seen.txt").write_text("This is seen too.")
    assert TextFolder(tmp_path, tokenizer).fingerprint != before.fingerprint


def test_sentences() -> None:
    text = 'One is here.  Two\nis "there!" (Three?) costs 3.5 now. ' + "word " * 200
    found = list(sentences(text))
    assert found[:3] == ["One is here.", 'Two is "there!"', "(Three?)"]
    assert found[3] == "costs 3.5 now."
    assert all(len(sentence) <= 400 for sentence in found)
    assert " ".join(found) == " ".join(text.split())


def test_a_repeated_sentence(tokenizer: Tokenizer) -> None:
    tokens = whole(Haystack(np.empty(0, np.int32), (), repeated(tokenizer, "Here we go.\n"), 1000))
    assert ("Here we go.\n" * 1000).startswith(tokenizer.decode(tokens))
