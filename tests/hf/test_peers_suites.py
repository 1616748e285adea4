"""What the test suites of peers ask of a causal language model, beyond generation: losses, types, copies, files."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from tests.support.hf_and_megatron import CALM, moved, settings, tokens

MODELS = {pattern: settings(pattern, **CALM) for pattern in ("M-*-", "A-", "C-", "D-G-", "R-", "F-")}
MODELS |= {preset: settings("M-", preset=preset) for preset in ("atlas", "titans", "dot")}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> AtlasForCausalLM:
    return moved(MODELS[request.param], torch.float32)


@torch.no_grad()
def test_losses_of_every_kind_of_label(model: AtlasForCausalLM) -> None:
    read = tokens(2, 20)
    labels = read.clone()
    labels[:, :7] = -100
    found = model(read, labels=labels)
    expected = F.cross_entropy(found.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found.loss, expected)
    # Of a batch in parts, by the tokens of all its parts; and with labels that were shifted before.
    torch.testing.assert_close(model(read, labels=labels, num_items_in_batch=52).loss, expected * 26 / 52)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100).contiguous()
    torch.testing.assert_close(model(read, labels=labels, shift_labels=shifted).loss, expected)


@torch.no_grad()
def test_outputs_as_a_tuple_are_those_of_the_class(model: AtlasForCausalLM) -> None:
    read, asked = tokens(2, 9), {"use_cache": False, "output_hidden_states": True}
    ours, theirs = model(read, **asked, return_dict=False), model(read, **asked).to_tuple()
    assert len(ours) == len(theirs) == 2 and torch.equal(ours[0], theirs[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))
    last = model(read, logits_to_keep=torch.tensor([3, 8])).logits
    torch.testing.assert_close(last, ours[0][:, [3, 8]])


@torch.no_grad()
def test_rows_without_text_and_batches_without_rows(model: AtlasForCausalLM) -> None:
    read, mask = tokens(2, 9), torch.ones(2, 9)
    mask[1] = 0
    expected = model(read[:1], use_cache=False).logits
    for kind in (torch.float32, torch.bool, torch.int32):
        found = model(read, attention_mask=mask.to(kind), use_cache=False).logits
        torch.testing.assert_close(found[:1], expected)
        assert bool(found.isfinite().all())
    for given in ({}, {"use_cache": False}, {"attention_mask": mask[:0]}):
        assert model(read[:0], **given).logits.shape == (0, 9, 64)


@torch.no_grad()
def test_one_prompt_is_continued_twice_from_a_copy(model: AtlasForCausalLM) -> None:
    read, after = tokens(2, 9), (tokens(2, 3, seed=4), tokens(2, 3, seed=5))
    cache = model(read).past_key_values
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        for text in after:
            found = model(text, past_key_values=copy.deepcopy(copied)).logits
            torch.testing.assert_close(found, model(torch.cat([read, text], 1)).logits[:, 9:], rtol=1e-4, atol=1e-4)
        assert copied.get_seq_length() == 9
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(read, past_key_values=cache).logits, model(read).logits)


def test_so_within_a_graph() -> None:
    model = moved(MODELS["M-*-"])
    cache = model(tokens(1, 9)).past_key_values
    model(tokens(1, 3), past_key_values=copy.deepcopy(cache)).logits.sum().backward()
    found = model.model.layers[0].mixer.start_first.grad
    model.zero_grad()
    model(torch.cat([tokens(1, 9), tokens(1, 3)], 1)).logits[:, 9:].sum().backward()
    torch.testing.assert_close(found, model.model.layers[0].mixer.start_first.grad)


def test_a_model_is_copied_and_pickled_whole(model: AtlasForCausalLM) -> None:
    read = tokens(2, 9)
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(read).logits, model(read).logits)
            assert other.lm_head.weight is other.model.embed_tokens.weight is not model.lm_head.weight
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())


def test_half_precision_reads_writes_and_learns(model: AtlasForCausalLM) -> None:
    read = tokens(2, 9)
    with torch.no_grad():
        expected = model(read, labels=read).loss
    for dtype in (torch.bfloat16, torch.float16):
        half = copy.deepcopy(model).to(dtype).train()
        found = half(read, labels=read)
        assert found.logits.dtype == dtype
        assert found.loss.item() == pytest.approx(expected.item(), rel=0.03)
        found.loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in half.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_kinds_of_checkpointing_give_the_gradients(model: AtlasForCausalLM) -> None:
    found: list[Tensor] = []
    for reentrant in (None, False, True):
        learner = copy.deepcopy(model).train()
        if reentrant is not None:
            learner.gradient_checkpointing_enable({"use_reentrant": reentrant})
        learner(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in learner.parameters()]))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_meta_device_tells_shapes(model: AtlasForCausalLM) -> None:
    read = tokens(2, 9).to("meta")
    assert copy.deepcopy(model).to("meta")(read, use_cache=False).logits.shape == (2, 9, 64)


@torch.no_grad()
def test_shards_and_types_of_a_saved_folder(tmp_path: Path) -> None:
    model, read = moved(MODELS["M-*-"], torch.float32), tokens(2, 9)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = AtlasForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(read).logits, model(read).logits)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    for given, dtype in (("bfloat16", torch.bfloat16), (torch.float16, torch.float16), ("auto", torch.float32)):
        assert AtlasForCausalLM.from_pretrained(tmp_path, dtype=given).dtype == dtype


def test_what_a_memory_cannot_do_is_refused(model: AtlasForCausalLM) -> None:
    """By transformers or by the model, in a line: what rolls a memory back, and attention of another kind."""
    prompt = tokens(1, 9)
    for options in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(prompt, max_new_tokens=2, **options)
    with pytest.raises(ValueError, match="cannot be cropped"):
        model(prompt).past_key_values.crop(4)
    with pytest.raises(ValueError, match="past_key_values is a tuple, and this model's state is a memory"):
        model(prompt, past_key_values=((torch.zeros(1, 1, 3, 4),) * 2,))
    with pytest.raises(ValueError, match="flex_attention"):
        copy.deepcopy(model).set_attn_implementation("flex_attention")


@torch.no_grad()
def test_shapes_that_do_not_fit_are_named(model: AtlasForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"the input has shape \(9,\); expected \[B, T\]"):
        model(tokens(2, 9)[0])
    cache = model(tokens(2, 9)).past_key_values
    for rows in (1, 3):
        with pytest.raises(ValueError, match=f"past_key_values has read 2 rows, and the input has {rows}"):
            model(tokens(rows, 3), past_key_values=copy.deepcopy(cache))
