"""The cache is the memory: what it continues is what one reading gives, row by row, from a file too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from atlas_megatron.config import Config
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.hf.cache_atlas import AtlasCache
from tests.support.hf_and_megatron import CALM, moved, settings, tokens

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
CUTS = {"halves": [25, 20], "in and between chunks": [1, 7, 8, 13, 16], "token by token": [1] * 45}
EVERY = settings("M-*-F-A-C-R-L-D-G-", **CALM)
EXPONENTIAL = settings("M-C-", preset="dot", window=5)
HIERARCHY = settings("M-A-", locals=("4/8", "2/16", "4/8"), projection=True, read="chunk", **CALM)
APART = {
    "*-F-": settings("*-F-"),
    "R-L-D-G-": settings("R-L-D-G-"),
    "A-M-": settings("A-M-", omega_gates="source", **CALM),
    "taylor": settings("M-", feature_map="taylor"),
    "shards": settings("M-", shard=8),
    "locals": HIERARCHY,
} | {name: settings("M-", preset=name) for name, keys in PRESETS.items() if keys["kernel"] == "lifted"}


def read(model: Any, whole: Tensor, lengths: list[int], **given: Any) -> Tensor:
    cache, pieces = None, []
    for piece in whole.split(lengths, 1):
        found = model(piece, past_key_values=cache, use_cache=True, **given)
        cache = found.past_key_values
        pieces.append(found.logits)
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("config", [EVERY, HIERARCHY], ids=["every layer", "locals"])
@pytest.mark.parametrize("lengths", CUTS.values(), ids=CUTS)
@torch.inference_mode()
def test_pieces_give_the_logits_of_the_whole(lengths: list[int], config: Config) -> None:
    model, whole = moved(config), tokens()
    torch.testing.assert_close(read(model, whole, lengths), model(whole).logits, **TOLERANCE)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_so_for_every_preset(preset: str) -> None:
    model, whole = moved(settings("M-", preset=preset)), tokens(length=29)
    torch.testing.assert_close(read(model, whole, [1, 10, 16, 1, 1]), model(whole).logits, **TOLERANCE)


@torch.no_grad()
def test_its_size_does_not_depend_on_what_was_read(tmp_path: Path) -> None:
    model, sizes = moved(settings("M-*-A-R-L-D-G-", locals=("4/8", "2/16"), projection=True, **CALM)), []
    for length in (16, 48):
        model(tokens(length=length)).past_key_values.save_memory(tmp_path / "memory")
        sizes.append((tmp_path / "memory").stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("config", APART.values(), ids=APART)
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(config: Config) -> None:
    model, whole, pads = moved(config), tokens(3, 40), [0, 1, 21]
    mask = torch.stack([torch.arange(40) >= pad for pad in pads]).long()
    padded = whole.masked_fill(mask == 0, 3)
    # The second cut leaves a row of padding alone; masks may be of all columns or of the new ones.
    for lengths, all_columns in (([40], True), ([17, 3, 20], True), ([30, 9, 1], False)):
        cache, pieces, stop = None, [], 0
        for length in lengths:
            start, stop = stop, stop + length
            shown = mask[:, :stop] if all_columns else mask[:, start:stop]
            found = model(padded[:, start:stop], attention_mask=shown, past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            pieces.append(found.logits)
        together = torch.cat(pieces, 1)
        assert cache.position.tolist() == [40, 39, 19] if lengths[0] < 40 else True
        for row, pad in enumerate(pads):
            alone = model(whole[row : row + 1, pad:]).logits
            torch.testing.assert_close(together[row : row + 1, pad:], alone, **TOLERANCE)


@torch.no_grad()
def test_a_padded_batch_generates_what_its_rows_do() -> None:
    model, whole = moved(settings("M-*-G-", **CALM)), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :9] = 0
    together = model.generate(whole, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, pad in enumerate((0, 9)):
        alone = model.generate(whole[row : row + 1, pad:], max_new_tokens=6, do_sample=False)
        assert torch.equal(together[row, 20:], alone[0, -6:])


@torch.no_grad()
def test_padding_that_cannot_be_kept_apart_is_refused() -> None:
    whole, left = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    left[0, :3] = 0
    with pytest.raises(ValueError, match="padding on the left.*: C layers"):
        moved(settings("C-"))(whole, attention_mask=left, use_cache=True)
    with pytest.raises(ValueError, match="padding on the left.*memory.kernel='exponential'"):
        moved(settings("M-", preset="dot", window=5))(whole, attention_mask=left, use_cache=True)
    model, right, hole = moved(settings("M-*-")), left.flip(1), torch.ones_like(left)
    hole[0, 4] = 0
    with pytest.raises(ValueError, match="leaves out tokens inside a text"):
        model(whole, attention_mask=hole)
    with pytest.raises(ValueError, match="ends with padding"):
        model(whole, attention_mask=right, use_cache=True)
    found = model(whole, attention_mask=right)
    assert found.past_key_values is None
    torch.testing.assert_close(found.logits[0, :9], model(whole[:1, :9]).logits[0], **TOLERANCE)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 5\)"):
        model(whole, attention_mask=left[:, :5])


@torch.no_grad()
def test_greedy_generation_is_the_likeliest_token_each_time() -> None:
    model = moved(EVERY)
    found = model.generate(tokens(2, 9), max_new_tokens=12, do_sample=False)
    assert torch.equal(found[:, 9:], model(found).logits.argmax(-1)[:, 8:-1])
    torch.manual_seed(0)
    first = model.generate(tokens(2, 9), max_new_tokens=12, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(first, model.generate(tokens(2, 9), max_new_tokens=12, do_sample=True, use_cache=False))


@torch.no_grad()
def test_beam_search_is_beam_search() -> None:
    model, beams, steps = moved(EVERY), 2, 8
    prompt = tokens(2, 9)
    found = model.generate(prompt, max_new_tokens=steps, num_beams=beams, do_sample=False)
    for row, expected in zip(prompt, found, strict=True):
        held = [(0.0, row)]
        for _ in range(steps):
            grown = []
            for score, text in held:
                chances = model(text[None], use_cache=False).logits[0, -1].float().log_softmax(-1)
                grown += [(score + float(chances[t]), torch.cat([text, t[None]])) for t in chances.topk(beams).indices]
            held = sorted(grown, key=lambda pair: -pair[0])[:beams]
        assert torch.equal(held[0][1], expected)


@pytest.mark.parametrize("config", [EVERY, HIERARCHY], ids=["every layer", "locals"])
@torch.no_grad()
def test_rows_are_chosen_and_repeated(config: Config) -> None:
    model, whole = moved(config), tokens(3, 20)
    expected = model(whole).logits[:, 15:]
    cache = model(whole[:, :15]).past_key_values
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    found = model(whole[[2, 0, 0], 15:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected[[2, 0, 0]], **TOLERANCE)
    cache = model(whole[:, :15]).past_key_values
    cache.batch_repeat_interleave(2)
    found = model(whole[:, 15:].repeat_interleave(2, 0), past_key_values=cache).logits
    torch.testing.assert_close(found, expected.repeat_interleave(2, 0), **TOLERANCE)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


@pytest.mark.parametrize("config", [EVERY, EXPONENTIAL, HIERARCHY], ids=["every layer", "exponential", "locals"])
@torch.no_grad()
def test_a_memory_goes_on_from_a_file(config: Config, tmp_path: Path) -> None:
    model, whole = moved(config), tokens(2, 30)
    model(whole[:, :19]).past_key_values.save_memory(tmp_path / "memory")
    cache = model.load_memory(tmp_path / "memory")
    found = model(whole[:, 19:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(whole).logits[:, 19:], **TOLERANCE)
    # `generate` takes a prompt after a file as its continuation.
    cache = model.load_memory(tmp_path / "memory")
    found = model.generate(whole[:, 19:], past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(found[:, 11:], model.generate(whole, max_new_tokens=5, do_sample=False)[:, 30:])
    assert cache.position == 30 + 4


@torch.no_grad()
def test_a_padded_memory_goes_on_from_a_file(tmp_path: Path) -> None:
    model, whole = moved(settings("M-*-", locals=("4/8",), projection=True, **CALM)), tokens(2, 30)
    mask = torch.ones(2, 19, dtype=torch.int64)
    mask[1, :5] = 0
    model(whole[:, :19], attention_mask=mask).past_key_values.save_memory(tmp_path / "memory")
    cache = model.load_memory(tmp_path / "memory")
    assert cache.position.tolist() == [19, 14] and cache.position.dtype == torch.int64
    found = model(whole[:, 19:], past_key_values=cache).logits[1:]
    torch.testing.assert_close(found, model(whole[1:, 5:]).logits[:, 14:], **TOLERANCE)


@torch.no_grad()
def test_another_models_memory_is_refused(tmp_path: Path) -> None:
    model = moved(settings("M-*-", **CALM))
    model(tokens(1, 9)).past_key_values.save_memory(tmp_path / "memory")
    other = moved(settings("M-F-", **{**CALM, "window": 4}))
    with pytest.raises(ValueError, match="another model: model.pattern: 'M-F-', not 'M-\\*-'; memory.window: 4, not 5"):
        other.load_memory(tmp_path / "memory")
    other = moved(settings("M-*-", locals=("4/8",), **CALM))
    with pytest.raises(ValueError, match=r"another model: memory.locals: \('4/8',\), not \[\]"):
        other.load_memory(tmp_path / "memory")
    other(tokens(1, 9)).past_key_values.save_memory(tmp_path / "hierarchy")
    same = moved(settings("M-*-", locals=("4/8",), **CALM))
    assert same.load_memory(tmp_path / "hierarchy").position == 9
    for keys, said in (({"shard": 8}, "memory.shard: 8, not 0"), ({"read": "chunk"}, "memory.read: 'chunk'")):
        with pytest.raises(ValueError, match=f"another model: {said}"):
            moved(settings("M-*-", **keys, **CALM)).load_memory(tmp_path / "memory")
    save_file({"x": torch.zeros(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="holds no memory"):
        model.load_memory(tmp_path / "weights")
    with pytest.raises(ValueError, match="nothing cannot be read"):
        model.load_memory(tmp_path / "nothing")


@torch.no_grad()
def test_a_memory_of_other_weights_is_refused(tmp_path: Path) -> None:
    """Of one shape, from another training; the same weights in another precision are the same model."""
    model = moved(settings("M-*-", **CALM), torch.float32)
    cache = model(tokens(1, 9)).past_key_values
    copy.deepcopy(cache).detach().save_memory(tmp_path / "memory")
    again = copy.deepcopy(model).bfloat16()
    assert again.load_memory(tmp_path / "memory").position == 9
    assert AtlasCache.load_memory(tmp_path / "memory", model.config).position == 9
    again.get_parameter("model.layers.2.norm.weight")[0] += 1
    with pytest.raises(ValueError, match="memory is the memory of another model: of this shape, with other weights"):
        again.load_memory(tmp_path / "memory")


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_damaged_memory_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    model = moved(settings("M-*-", **CALM), dtype)
    model(tokens(1, 9)).past_key_values.save_memory(tmp_path / "memory")
    assert model.load_memory(tmp_path / "memory").position == 9
    raw = bytearray((tmp_path / "memory").read_bytes())
    raw[-5] ^= 1
    (tmp_path / "memory").write_bytes(raw)
    with pytest.raises(ValueError, match="memory is damaged: its tensors are not those that were written"):
        model.load_memory(tmp_path / "memory")


@torch.no_grad()
def test_positions_count_in_64_bits() -> None:
    model, whole = moved(settings("*-F-")), tokens(1, 12)
    found = []
    for far in (0, 3 * 2**31):
        cache = model(whole[:, :1]).past_key_values
        cache.states, cache.position = [None] * 4, far
        found.append(model(whole, past_key_values=cache).logits)
        assert cache.position == far + 12
    # Attention knows distances alone; its angles are taken in float64, its rotation in float32.
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_memory_stays_in_float32() -> None:
    model = moved(settings("M-D-", **CALM), torch.bfloat16)
    cache = model(tokens(1, 9)).past_key_values
    memory, _, delta, _ = cache.states
    for state in (memory.memory, delta.memory):
        assert {t.dtype for t in state.tensors()} == {torch.float32}
    # What was read in inference mode first is no obstacle to training.
    with torch.inference_mode():
        model(tokens(1, 9))
    with torch.enable_grad():
        model(tokens(1, 9), labels=tokens(1, 9)).loss.backward()
