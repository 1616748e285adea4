"""Padding, positions and packed documents as other people's collators give them: each text as if it stood alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from atlas_megatron.config import Config
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from tests.support.hf_and_megatron import CALM, moved, settings, tokens

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
APART = ("M-", "M-*-", "A-", "D-G-", "R-L-", "F-", "M- locals")
LOCALS = {"locals": ("4/8", "2/4", "4/8"), "projection": True, "read": "chunk", "shard": 16}


def of(name: str) -> Config:
    pattern, *hierarchy = name.split()
    return settings(pattern, **CALM, **(LOCALS if hierarchy else {}))


@pytest.fixture(scope="module", params=(*APART, "C-"))
def model(request: pytest.FixtureRequest) -> AtlasForCausalLM:
    return moved(of(request.param))


def left_padded(pads: tuple[int, ...] = (0, 3, 21), length: int = 30) -> Tensor:
    return torch.stack([torch.arange(length) >= pad for pad in pads]).long()


@torch.no_grad()
def test_positions_that_say_nothing_new_change_nothing(model: AtlasForCausalLM) -> None:
    read, mask = tokens(3, 30), left_padded()
    expected = model(read).logits
    for positions in (torch.arange(30)[None], torch.arange(30).expand(3, -1), torch.arange(7, 37)[None]):
        assert torch.equal(model(read, position_ids=positions).logits, expected)
    cache = model(read[:, :12], use_cache=True).past_key_values
    found = model(read[:, 12:], past_key_values=cache, position_ids=torch.arange(12, 30)[None]).logits
    torch.testing.assert_close(found, expected[:, 12:], **TOLERANCE)
    # As transformers counts them beside a mask.
    counted = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    expected = model(read, attention_mask=mask, use_cache=False).logits
    found = model(read, attention_mask=mask, position_ids=counted, use_cache=False).logits
    assert torch.equal(found, expected)


@torch.no_grad()
def test_without_a_cache_every_layer_keeps_padding_apart(model: AtlasForCausalLM) -> None:
    read, mask = tokens(3, 30), left_padded()
    found = model(read, attention_mask=mask, use_cache=False, output_hidden_states=True)
    assert found.past_key_values is None
    for row, pad in enumerate((0, 3, 21)):
        alone = model(read[row : row + 1, pad:], output_hidden_states=True)
        torch.testing.assert_close(found.logits[row : row + 1, pad:], alone.logits, **TOLERANCE)
        for ours, theirs in zip(found.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(ours[row : row + 1, pad:], theirs, **TOLERANCE)
    # Padding on both sides, as pieces of padded batches have it.
    mask[1, -4:] = 0
    found = model(read, attention_mask=mask, use_cache=False).logits[1:2, 3:26]
    torch.testing.assert_close(found, model(read[1:2, 3:26]).logits, **TOLERANCE)


@pytest.mark.parametrize("preset", [name for name, keys in PRESETS.items() if keys["kernel"] != "lifted"])
@torch.no_grad()
def test_so_do_exponential_kernels(preset: str) -> None:
    model, read, mask = moved(settings("M-", preset=preset)), tokens(3, 30), left_padded()
    found = model(read, attention_mask=mask, use_cache=False).logits
    for row, pad in enumerate((0, 3, 21)):
        torch.testing.assert_close(found[row : row + 1, pad:], model(read[row : row + 1, pad:]).logits, **TOLERANCE)


@pytest.mark.parametrize("pattern", [*APART, "C-", "exponential", "softmax"])
@torch.no_grad()
def test_packed_documents_are_read_apart(pattern: str) -> None:
    from transformers import DataCollatorWithFlattening

    exponential = {"preset": "dot", "window": 5, "kernel": pattern}
    config = of(pattern) if pattern in (*APART, "C-") else settings("M-C-", **exponential)
    model, whole = moved(config), tokens(1, 40)[0]
    texts = whole.split([13, 1, 26])
    batch = DataCollatorWithFlattening()([{"input_ids": text.tolist(), "labels": text.tolist()} for text in texts])
    assert batch["position_ids"][0, 12:16].tolist() == [12, 0, 0, 1]
    found = model(**batch)
    alone = [model(text[None], labels=text[None]) for text in texts]
    torch.testing.assert_close(found.logits, torch.cat([one.logits for one in alone], 1), **TOLERANCE)
    expected = (alone[0].loss * 12 + alone[2].loss * 25) / 37
    torch.testing.assert_close(found.loss, expected)
    if pattern not in APART:
        assert found.past_key_values is None
        with pytest.raises(ValueError, match="packed documents, which this model cannot keep apart in a cache"):
            model(**batch, use_cache=True)
        return
    # What follows goes on with the last document.
    after = tokens(1, 5, seed=3)
    cache = model(whole[None], position_ids=batch["position_ids"]).past_key_values
    together = torch.cat([texts[2][None], after], 1)
    found = model(after, past_key_values=cache).logits
    torch.testing.assert_close(found, model(together).logits[:, 26:], **TOLERANCE)


@pytest.mark.parametrize("pattern", ["M-*-", "C-"])
@torch.no_grad()
def test_packed_rows_may_be_padded(pattern: str) -> None:
    model, read = moved(settings(pattern, **CALM)), tokens(2, 30)
    positions, mask = torch.arange(30).expand(2, -1).clone(), torch.ones(2, 30, dtype=torch.int64)
    positions[0, 11:], positions[1, 24:] = torch.arange(19), 0
    mask[1, 24:] = 0
    found = model(read, position_ids=positions, attention_mask=mask).logits
    pieces = ((0, 0, 11), (0, 11, 30), (1, 0, 24))
    for row, start, stop in pieces:
        alone = model(read[row : row + 1, start:stop]).logits
        torch.testing.assert_close(found[row : row + 1, start:stop], alone, **TOLERANCE)
    if pattern == "C-":
        return
    # On the left, with a cache.
    turned, left = torch.cat([positions[1:, 24:], positions[1:, :24]], 1), mask[1:].flip(1)
    given = torch.cat([read[1:, 24:], read[1:, :24]], 1)
    found = model(given, position_ids=turned, attention_mask=left, use_cache=True)
    torch.testing.assert_close(found.logits[:, 6:], model(read[1:, :24]).logits, **TOLERANCE)
    assert found.past_key_values.position.tolist() == [24]


@torch.no_grad()
def test_positions_that_cannot_be_followed_are_refused() -> None:
    model, read = moved(settings("M-*-", **CALM)), tokens(2, 9)
    gap = torch.tensor([[0, 1, 2, 3, 7, 8, 9, 10, 11]])
    with pytest.raises(ValueError, match="position_ids goes from 3 to 7 in row 0; positions count up by one"):
        model(read, position_ids=gap)
    with pytest.raises(ValueError, match=r"position_ids has shape \(3, 9\); expected \[B, T\] = \(2, 9\)"):
        model(read, position_ids=torch.arange(9).expand(3, -1))
    cache = model(read).past_key_values
    with pytest.raises(ValueError, match=r"position_ids begins at \[0, 0\], and the cache has read \[9, 9\] tokens"):
        model(read, past_key_values=cache, position_ids=torch.arange(9)[None])


def test_gradients_of_packed_documents_are_those_of_each() -> None:
    model, read = moved(settings("C-", **CALM)), tokens(1, 20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    found = []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            model(read, position_ids=positions, output_hidden_states=True).logits.square().sum().backward()
        else:
            for piece in read.split([8, 12], 1):
                model(piece).logits.square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, **TOLERANCE)


@torch.no_grad()
def test_borders_that_are_said_in_another_way_are_refused_or_repeated(model: AtlasForCausalLM) -> None:
    from transformers import DataCollatorWithFlattening

    whole = tokens(1, 9)
    borders = torch.tensor([0, 4, 9], dtype=torch.int32)
    for bare in (model, model.model):
        with pytest.raises(ValueError, match="cu_seqlens was given without position_ids, by which this model tells"):
            bare(whole, cu_seqlens=borders)
    texts = [{"input_ids": piece.tolist()} for piece in whole[0].split([4, 5])]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(texts)
    assert batch["cu_seq_lens_q"].tolist() == borders.tolist()
    found = model(**batch).logits
    torch.testing.assert_close(found[:, 4:], model(whole[:, 4:]).logits, **TOLERANCE)
