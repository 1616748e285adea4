"""Reading in pieces is reading whole, and generation continues it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from atlas_megatron.config import MemoryConfig
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.data.tokenizer import Tokenizer
from atlas_megatron.inference.reader import MegatronReader
from atlas_megatron.inference.streaming import generate, read
from atlas_megatron.mixers.stream import StreamContext, mapped
from atlas_megatron.model.build import build_model
from tests.support.small_model import SMALL

CUTS = {"halves": [25, 20], "in and between chunks": [1, 7, 8, 13, 16], "token by token": [1] * 45}


def build(pattern: str, dtype: torch.dtype, memory: MemoryConfig = SMALL.memory) -> Any:
    model = build_model(replace(SMALL, model=replace(SMALL.model, pattern=pattern), memory=memory))
    model.config.params_dtype = dtype
    with torch.no_grad():
        for parameter in model.to(dtype).parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


@pytest.mark.parametrize("lengths", CUTS.values(), ids=CUTS)
# In float32 one layer of each: Newton-Schulz blows small directions of the momentum up, and their rounding with them.
@pytest.mark.parametrize(
    ("pattern", "dtype", "tolerance"),
    [
        ("M-", torch.float64, 1e-9),
        ("*-", torch.float64, 1e-9),
        ("M-*-M-", torch.float64, 1e-9),
        ("F-", torch.float64, 1e-9),
        ("A-", torch.float64, 1e-9),
        ("C-", torch.float64, 1e-9),
        ("M-*-", torch.float32, 1e-4),
    ],
)
@pytest.mark.usefixtures("single_process_megatron")
def test_pieces_give_the_logits_of_the_whole(
    pattern: str, dtype: torch.dtype, tolerance: float, lengths: list[int]
) -> None:
    model = build(pattern, dtype)
    tokens = torch.randint(64, (2, 45), generator=torch.Generator().manual_seed(2))
    context = StreamContext()
    with torch.no_grad():
        whole = model(tokens, None, None)
        pieces = torch.cat([read(model, piece, context) for piece in tokens.split(lengths, 1)], 1)
    assert whole.dtype == dtype
    torch.testing.assert_close(pieces, whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.usefixtures("single_process_megatron")
def test_every_preset_reads_in_pieces(preset: str) -> None:
    model = build("M-", torch.float64, replace(SMALL.memory, **PRESETS[preset]))
    tokens = torch.randint(64, (2, 29), generator=torch.Generator().manual_seed(2))
    context = StreamContext()
    with torch.no_grad():
        whole = model(tokens, None, None)
        pieces = torch.cat([read(model, piece, context) for piece in tokens.split([1, 10, 16, 1, 1], 1)], 1)
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)


def states_of_every_kind() -> list[Any]:
    patterns = [pytest.param(f"{symbol}-", "", id=symbol) for symbol in "M*FACRLDG"]
    return patterns + [pytest.param("M-", preset, id=preset) for preset in PRESETS]


@pytest.mark.parametrize(("pattern", "preset"), states_of_every_kind())
@pytest.mark.usefixtures("single_process_megatron")
def test_a_mark_is_come_back_to_with_some_of_its_rows(pattern: str, preset: str) -> None:
    memory = replace(SMALL.memory, **PRESETS.get(preset, {}))
    model = build(pattern, torch.float64, memory)
    config = replace(SMALL, model=replace(SMALL.model, pattern=pattern), memory=memory)
    reader = MegatronReader(model, config, Tokenizer("", list, str, vocab_size=64, eod=0))
    tokens = torch.randint(64, (3, 29), generator=torch.Generator().manual_seed(2))
    head, tail = tokens.split([13, 16], 1)
    reader.read(head)
    mark = reader.mark()
    reader.read(tail)
    reader.back(mark)
    again = reader.read(tail)
    reader.back(mark, [2, 0, 0])
    some = reader.read(tail[[2, 0, 0]], keep=5)
    whole = model(tokens, None, None)
    torch.testing.assert_close(again, whole[:, 13:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(some, whole[[2, 0, 0], -5:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("pattern", "preset"), states_of_every_kind())
@pytest.mark.usefixtures("single_process_megatron")
def test_a_state_grows_as_it_says(pattern: str, preset: str) -> None:
    memory = replace(SMALL.memory, **PRESETS.get(preset, {}))
    attention = replace(SMALL.attention, segment=8)
    config = replace(SMALL, model=replace(SMALL.model, pattern=pattern), memory=memory, attention=attention)
    model = build_model(config).eval()
    reader = MegatronReader(model, config, Tokenizer("", list, str, vocab_size=64, eod=0))
    sizes = []
    for _ in range(3):  # whole chunks and segments; windows are full after the first
        reader.read(torch.zeros(3, 16, dtype=torch.int64))
        sizes.append(held(reader.mark()))
    assert [after - before for before, after in pairwise(sizes)] == pytest.approx([3 * 16 * reader.growth] * 2)


def held(state: Any) -> int:
    """Bytes of its tensors."""
    sizes = []

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    mapped(state, noted)
    return sum(sizes)


@pytest.mark.usefixtures("single_process_megatron")
def test_gradients_flow_back_over_a_cut() -> None:
    model = build("M-*-", torch.float64)
    tokens = torch.randint(64, (1, 24), generator=torch.Generator().manual_seed(2))
    gradients = []
    for lengths in ([24], [11, 13]):
        context = StreamContext()
        model.zero_grad()
        torch.cat([read(model, piece, context) for piece in tokens.split(lengths, 1)], 1).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("single_process_megatron")
def test_generation_takes_the_likeliest_token_at_temperature_zero() -> None:
    model = build("M-*-", torch.float32)
    prompt = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(2))
    tokens = generate(model, prompt, 12, temperature=0.0)
    assert torch.equal(tokens[:, :9], prompt) and tokens.shape == (2, 21)
    with torch.no_grad():
        likeliest = model(tokens, None, None).argmax(-1)
    assert torch.equal(tokens[:, 9:], likeliest[:, 8:-1])


@pytest.mark.usefixtures("single_process_megatron")
def test_generation_repeats_with_its_seed_and_narrows_with_top_p() -> None:
    model = build("*-", torch.float32)
    prompt = torch.zeros(4, 3, dtype=torch.int64)
    first, again, other = (generate(model, prompt, 16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    greedy = generate(model, prompt, 16, temperature=0.0)
    assert torch.equal(generate(model, prompt, 16, top_p=1e-9), greedy)


@pytest.mark.usefixtures("single_process_megatron")
def test_bad_arguments_are_named() -> None:
    model = build("*-", torch.float32)
    prompt = torch.zeros(1, 3, dtype=torch.int64)
    for wrong, text in (
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"tokens": prompt[:, :0]}, r"tokens has shape \(1, 0\)"),
    ):
        with pytest.raises(ValueError, match=text):
            generate(model, **({"tokens": prompt, "max_new_tokens": 1} | wrong))
    model.config.sequence_parallel = True
    with pytest.raises(ValueError, match="parallel.sequence=true"):
        read(model, prompt, StreamContext())
