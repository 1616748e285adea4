"""What other people's generation code asks of the model: transformers' own options, and the same answers under each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from tests.support.hf_and_megatron import CALM, moved, settings, tokens

PATTERNS = ("M-", "M-*-", "A-", "C-", "D-G-", "R-", "F-", "M-A- locals")
LOCALS = {"locals": ("4/8", "2/4", "4/8"), "projection": True, "read": "chunk"}
NEW = 5


@pytest.fixture(scope="module", params=PATTERNS)
def model(request: pytest.FixtureRequest) -> AtlasForCausalLM:
    pattern, *hierarchy = request.param.split()
    return moved(settings(pattern, **CALM, **(LOCALS if hierarchy else {})))


def continued(model: AtlasForCausalLM, prompt: Tensor | None, **options: Any) -> Tensor:
    """The new tokens [B, NEW] of a greedy continuation."""
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=NEW, do_sample=False, **options)[:, -NEW:]


def test_every_way_of_reading_a_prompt_gives_one_continuation(model: AtlasForCausalLM) -> None:
    prompt = tokens(2, 21)
    expected = continued(model, prompt)
    embedded = model.get_input_embeddings()(prompt)
    ways: dict[str, Tensor] = {
        "without a cache": continued(model, prompt, use_cache=False),
        "in chunks": continued(model, prompt, prefill_chunk_size=8),
        "in chunks of one": continued(model, prompt, prefill_chunk_size=1),
        "embedded": continued(model, None, inputs_embeds=embedded),
        "embedded, with a mask": continued(
            model, None, inputs_embeds=embedded, attention_mask=torch.ones_like(prompt)
        ),
        "with positions": continued(model, prompt, position_ids=torch.arange(21).expand(2, -1)),
    }
    for name, found in ways.items():
        assert torch.equal(found, expected), name


def test_prompts_of_several_lengths(model: AtlasForCausalLM) -> None:
    prompt, mask = tokens(2, 21), torch.ones(2, 21, dtype=torch.int64)
    mask[1, :9] = 0
    alone = torch.cat([continued(model, prompt[:1]), continued(model, prompt[1:, 9:])])
    ways: dict[str, dict[str, Any]] = {"without a cache": {"use_cache": False}}
    if "C" not in model.config.pattern:
        ways |= {"with one": {}, "in chunks": {"prefill_chunk_size": 4}}
    for name, options in ways.items():
        assert torch.equal(continued(model, prompt, attention_mask=mask, **options), alone), name


def test_a_model_in_training_generates_the_same_under_gradient_checkpointing(model: AtlasForCausalLM) -> None:
    prompt = tokens(2, 9)
    expected = continued(model, prompt)
    model.train()
    model.gradient_checkpointing_enable()
    try:
        assert torch.equal(continued(model, prompt), expected)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


@torch.no_grad()
def test_hidden_states_and_scores_come_with_the_tokens(model: AtlasForCausalLM) -> None:
    options: dict[str, Any] = {"output_hidden_states": True, "output_scores": True, "return_dict_in_generate": True}
    found = model.generate(tokens(2, 9), max_new_tokens=NEW, do_sample=False, **options)
    layers = len(model.config.pattern)
    assert [len(step) for step in found.hidden_states] == [layers + 1] * NEW
    assert [step[-1].shape[1] for step in found.hidden_states] == [9] + [1] * (NEW - 1)
    torch.testing.assert_close(model.lm_head(found.hidden_states[0][-1][:, -1]).float(), found.scores[0])
    # A continuation of a continuation, as a chat has it.
    told = torch.cat([found.sequences, tokens(2, 4)], 1)
    again = model.generate(told, past_key_values=found.past_key_values, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(again[:, -NEW:], continued(model, told))


@torch.no_grad()
def test_a_configuration_may_ask_for_hidden_states() -> None:
    model = moved(settings("M-*-", **CALM))
    assert model(tokens(2, 9)).hidden_states is None
    model.config.output_hidden_states = True
    found = model(tokens(2, 9)).hidden_states
    assert len(found) == 5 and torch.equal(model.lm_head(found[-1]), model(tokens(2, 9)).logits)
    assert model(tokens(2, 9), output_hidden_states=False).hidden_states is None


def test_beams_and_samples_of_a_padded_batch(model: AtlasForCausalLM) -> None:
    if "C" in model.config.pattern:
        pytest.skip("C layers keep no padding apart with a cache")
    prompt, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    found = continued(model, prompt, attention_mask=mask, num_beams=3, num_return_sequences=2)
    alone = continued(model, prompt[:1, 5:], num_beams=3, num_return_sequences=2)
    assert torch.equal(found[:2], alone) and found.shape == (4, NEW)


def test_an_empty_prompt_begins_with_the_first_token_of_a_text() -> None:
    model = moved(settings("M-*-", **CALM))
    model.generation_config.bos_token_id = 7
    expected = continued(model, torch.tensor([[7]]))
    assert torch.equal(continued(model, None), expected)
    with pytest.raises(ValueError, match=r"shape \(2, 0\), no token; give at least one"):
        model(torch.empty(2, 0, dtype=torch.int64))


@torch.no_grad()
def test_caches_of_others_are_refused_by_name() -> None:
    from transformers import DynamicCache, StaticCache

    model = moved(settings("M-*-", **CALM))
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=32), ((tokens(), tokens()),)):
        with pytest.raises(ValueError, match=f"past_key_values is a {type(cache).__name__}, and this model's state"):
            model(tokens(2, 9), past_key_values=cache)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache"):
        continued(model, tokens(2, 9), past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="continuous batching keeps pages"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)
