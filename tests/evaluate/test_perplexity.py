"""What context is worth, through the state, against plain forwards of whole sequences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.evaluate import perplexity
from atlas_megatron.evaluate.perplexity import Text, after_context, along, bins, places, summary
from atlas_megatron.inference.reader import MegatronReader
from atlas_megatron.model.build import build_model
from tests.support.small_model import SMALL

CLOSE = {"rel": 1e-6, "abs": 1e-6}  # cells hold six decimals


@pytest.fixture
def reader(single_process_megatron: None, monkeypatch: pytest.MonkeyPatch) -> MegatronReader:
    monkeypatch.setattr(perplexity, "TARGET", 8)
    config = replace(SMALL, model=replace(SMALL.model, pattern="M-*-"))
    model = build_model(config).double().eval()
    model.config.params_dtype = torch.float64
    letters = Tokenizer("", list, lambda ids: "x" * len(ids), vocab_size=60, eod=0)
    return MegatronReader(model, config, letters)


@pytest.fixture
def text() -> Text:
    return Text("trial", np.random.default_rng(0).integers(0, 60, 400).astype(np.uint16))


def plain(reader: MegatronReader, text: Text, start: int, stop: int) -> torch.Tensor:
    """The loss of tokens (start, stop) of the text, read whole from `start` on; token `start` is only read."""
    tokens = torch.from_numpy(text.tokens[start:stop].astype(np.int64))[None]
    with torch.no_grad():
        logits = reader._model(tokens[:, :-1], None, None)[..., :60]
    return F.cross_entropy(logits[0].float(), tokens[0, 1:], reduction="none")


@pytest.mark.parametrize("context", [0, 1, 37])
def test_targets_cost_what_a_whole_reading_says(reader: MegatronReader, text: Text, context: int) -> None:
    starts = places(text, 37, 3)
    cell = after_context(reader, text, starts, context, segment=10)
    wanted = [plain(reader, text, start - 1 - context, start + 8)[-8:].mean().item() for start in starts]
    assert cell["mean_loss"] == pytest.approx(wanted, **CLOSE)
    ends = sum(int((text.tokens[start : start + 8] == 0).sum()) for start in starts)
    assert (cell["tokens"], cell["bytes"]) == (24, 24 - ends)  # the ends of documents have no text


def test_along_is_the_loss_of_each_position(reader: MegatronReader, text: Text) -> None:
    starts = places(text, 37, 2)
    cell = along(reader, text, starts, 37, segment=10)
    whole = torch.stack([plain(reader, text, start - 38, start) for start in starts]).mean(0)
    assert cell["ends"] == bins(37) and cell["ends"][-1] == len(whole) == 37
    wanted = [whole[a:b].mean().item() for a, b in zip([0, *cell["ends"]], cell["ends"], strict=False)]
    assert cell["loss"] == pytest.approx(wanted, **CLOSE)


def test_bins_grow_by_a_factor_and_end_with_the_length() -> None:
    assert bins(1) == [1] and bins(16) == [1, 2, 3, 4, 6, 8, 11, 16] and bins(1000)[-2:] == [724, 1000]


def test_a_summary_weighs_targets_alike() -> None:
    cells = [
        {"context": 4, "mean_loss": [1.0, 3.0], "tokens": 16, "bytes": 32},
        {"context": 4, "mean_loss": [2.0], "tokens": 8, "bytes": 16},
    ]
    found = summary(cells)
    assert found["loss"] == 2.0 and found["error"] == pytest.approx(3**-0.5)
    assert found["bits_per_byte"] == pytest.approx(2.0 / 2 / np.log(2))
    assert found["perplexity"] == pytest.approx(np.e**2)


def test_a_text_too_short_is_refused(text: Text, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trial holds 400 tokens; a context of 300 needs 429"):
        places(text, 300, 2)
    file = tmp_path / "text.txt"
    file.write_text("a few words of text " * 50)
    letters = Tokenizer("", lambda words: [ord(letter) for letter in words], str, vocab_size=256, eod=0)
    assert perplexity.from_file(file, letters, 30).tokens.tolist() == [ord(c) for c in file.read_text()[:30]]
