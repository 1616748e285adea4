"""A trained memory at another chunk: what a token writes stays as it was trained; what has no other is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from atlas_kernels import Gates
from atlas_kernels.layer_start import eta_start, gate_count, gate_starts, gates_of
from atlas_kernels.local_memories import locals_of
from atlas_megatron.config import Config, MemoryConfig, at_chunk, continued
from atlas_megatron.config.chunks import as_trained, chunk_of, said
from atlas_megatron.config.presets import PRESETS

CHUNKS = (1, 4, 8, 32, 128)


def member(preset: str, **keys: Any) -> MemoryConfig:
    own = {"chunk": 32, "window": 4, "heads": 2, "head_dim": 8, **PRESETS[preset], "preset": preset, **keys}
    return MemoryConfig(**own)


def gates(memory: MemoryConfig) -> Gates:
    """Of twelve tokens with logits that hang on nothing but a seed."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 12, memory.heads * gate_count(memory), generator=generator)
    # A trained parameter: where it started hangs on the chunk that it was made for.
    bias = torch.tensor(gate_starts(replace(memory, chunk=32, ns_period=1), 64)).repeat(memory.heads, 1)
    values = torch.zeros(1, 12, memory.heads, memory.head_dim)
    return gates_of(memory, logits, bias, values, values)


@pytest.mark.parametrize("preset", ["omeganet", "titans", "ttt", "dla", "swla"])
def test_without_newton_schulz_every_gate_stays_as_it_was(preset: str) -> None:
    trained = member(preset)
    for chunk in CHUNKS:
        read = at_chunk(trained, chunk)
        assert read.chunk == chunk and replace(read, chunk=32, eta_start=0.0) == trained
        for ours, theirs in zip(vars(gates(read)).values(), vars(gates(trained)).values(), strict=True):
            assert torch.equal(ours, theirs)
        read.rule()
    # What `memory.chunk` alone would have derived, where it sums steps over a chunk.
    assert (eta_start(replace(trained, chunk=4)) == eta_start(trained)) == (preset == "swla")


@pytest.mark.parametrize(("period", "chunk", "kept"), [(32, 8, 8), (32, 1, 1), (8, 4, 4), (8, 32, 8), (32, 128, 32)])
@pytest.mark.parametrize("given", [0.0, 0.3])
def test_a_write_stands_for_the_tokens_of_its_period(period: int, chunk: int, kept: int, given: float) -> None:
    """Of the last token's step: with more writes each is as much smaller. Of summed steps: nothing changes."""
    last = member("atlas", ns_period=period, eta_start=given)
    read = at_chunk(last, chunk)
    assert read.ns_period == kept and read.rule().chunk % kept == 0
    assert torch.allclose(gates(read).eta / kept, gates(last).eta / period, rtol=1e-6, atol=0)
    for name in ("alpha", "theta", "gamma"):
        assert torch.equal(getattr(gates(read), name), getattr(gates(last), name))
    summed = replace(last, ns_step="sum")
    assert at_chunk(summed, chunk).ns_period == kept
    assert torch.equal(gates(at_chunk(summed, chunk)).eta, gates(summed).eta)


def test_a_chunk_that_the_period_does_not_divide_takes_what_divides_both() -> None:
    assert at_chunk(member("atlas", ns_period=8), 12).ns_period == 4
    assert at_chunk(member("atlas", ns_period=8), 7).ns_period == 1


def test_its_own_chunk_changes_nothing_and_back_again_is_where_it_was() -> None:
    for trained in (member("delta", chunk=1), member("deep_transformer"), member("atlas", ns_period=32)):
        assert at_chunk(trained, trained.chunk) == trained
    for trained in (member("titans"), member("atlas", ns_period=8)):
        back = at_chunk(at_chunk(trained, 128), 32)
        assert back == replace(trained, eta_start=eta_start(trained))


@pytest.mark.parametrize(
    ("memory", "chunk", "message"),
    [
        (member("delta"), 8, "memory.chunk=8 of the delta rule, .*; set memory.chunk=1"),
        (member("deep_transformer"), 8, "memory.kernel='exponential' keeps its sources .*: set memory.chunk=32"),
        (member("dot", kernel="softmax"), 8, "memory.kernel='softmax' keeps its sources"),
        (member("atlas"), 0, "memory.chunk=0 must be at least 1 token"),
    ],
)
def test_what_has_no_other_chunk_is_refused_by_name(memory: MemoryConfig, chunk: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        at_chunk(memory, chunk)


def of(memory: MemoryConfig, pattern: str = "M-*-", **model: Any) -> Config:
    config = Config(memory=memory)
    return replace(config, model=replace(config.model, pattern=pattern, **model))


def test_a_run_goes_on_with_the_trained_steps() -> None:
    before = of(member("titans"))
    config = continued(of(member("titans", chunk=8)), before)
    assert config.memory == at_chunk(before.memory, 8) and config.memory.eta_start > 0
    # Once more, as it is resumed: from its own checkpoint, with the same words.
    assert continued(of(member("titans", chunk=8)), config) == config
    atlas = of(member("atlas", ns_period=32))
    assert continued(of(member("atlas", chunk=8, ns_period=8)), atlas).memory == at_chunk(atlas.memory, 8)
    assert continued(of(member("titans"), "F-"), of(member("titans"), "F-")) == of(member("titans"), "F-")


def test_a_run_that_goes_on_steps_as_its_checkpoint_whatever_its_words_would_derive() -> None:
    words, second = of(member("titans", chunk=8)), continued(of(member("titans", chunk=8)), of(member("titans")))
    assert as_trained(words, second) == second != words
    assert as_trained(words, words) == words
    # Given in words, or at another chunk, or without a memory, it is left for the comparison to refuse.
    for other in (member("titans", chunk=8, eta_start=1.0), member("titans", chunk=4)):
        assert as_trained(of(other), second) == of(other)
    assert as_trained(of(member("titans", chunk=8), "F-"), second).memory.eta_start == 0
    local = hierarchy("2/64", "4/32")
    assert as_trained(of(local), of(hierarchy("2/64/8", "4/32/16"))).memory == hierarchy("2/64/8", "4/32/16")
    assert as_trained(of(local), of(hierarchy("2/64/8"))).memory == local


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (of(member("titans", chunk=8, heads=4)), "memory.heads: 4, the checkpoint has 2"),
        (of(member("titans", chunk=8), hidden_size=64), "model.hidden_size: 64, the checkpoint has 256"),
        (of(member("titans", chunk=8), vocab_size=64), "model.vocab_size: 64, the checkpoint has 4096"),
        (of(member("omeganet", chunk=8)), "memory.momentum: False, the checkpoint has True"),
        (of(member("titans", chunk=8), "M-M-"), "model.pattern: 'M-M-', the checkpoint has 'M-\\*-'"),
        (of(member("titans", chunk=8, eta_start=1.0)), "set .* at memory.chunk=8; memory.eta_start=0 takes"),
    ],
)
def test_another_model_is_refused_with_both_values(ours: Config, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        continued(ours, of(member("titans")))


def test_what_changes_is_said() -> None:
    trained = member("atlas", ns_period=32, eta_per_token=0.005)
    assert said(trained, trained) == ""
    assert said(trained, at_chunk(trained, 8)) == (
        "memory.chunk=8 (was 32), ns_period=8 (was 32), eta_start=0.04 (was 0.16)"
    )
    assert said(member("titans"), at_chunk(member("titans"), 8)) == (
        "memory.chunk=8 (was 32), eta_start=0.0003125 (stays)"
    )


def hierarchy(*words: str, **keys: Any) -> MemoryConfig:
    return member("omeganet", locals=words, **keys)


def test_of_local_memories_it_is_their_chunk_that_changes() -> None:
    """Each keeps the step that it was trained with; the layer's own memory stays."""
    trained = hierarchy("8/64", "16/32")
    read = at_chunk(trained, 2)
    assert read == replace(trained, locals=("2/64/8", "2/32/16"))
    for ours, theirs in zip(locals_of(read), locals_of(trained), strict=True):
        assert ours.chunk == 2 and eta_start(ours) == eta_start(theirs)
    assert at_chunk(read, 8) == replace(trained, locals=("8/64", "8/32/16"))
    assert chunk_of(trained) == 8 and chunk_of(read) == 2 and chunk_of(member("omeganet")) == 32
    with pytest.raises(ValueError, match="shard=32 must be 0 .* or a multiple of chunk=64"):
        at_chunk(trained, 64)
    assert said(trained, read) == "memory.locals=2/64/8, 2/32/16 (was 8/64, 16/32)"


def test_orthogonal_writes_of_local_memories_stand_for_their_period() -> None:
    trained = member("atlas", ns_period=32, locals=("16/64",))
    read = at_chunk(trained, 4)
    assert read.locals == ("4/64/16",)
    (ours,), (theirs,) = locals_of(read), locals_of(trained)
    assert eta_start(ours) / ours.ns_period == eta_start(theirs) / theirs.ns_period


def test_a_second_stage_takes_other_local_chunks_and_no_other_hierarchy() -> None:
    before = Config(memory=hierarchy("8/64", "16/32"))
    after = continued(replace(before, memory=hierarchy("2/64", "4/32")), before)
    assert after.memory == hierarchy("2/64/8", "4/32/16")
    for words, keys in ((("8/64",), {}), (("8/32", "16/32"), {}), (("8/64", "16/32"), {"projection": True})):
        with pytest.raises(ValueError, match=r"it is another model: memory\.(locals|projection): "):
            continued(replace(before, memory=hierarchy(*words, **keys)), before)
