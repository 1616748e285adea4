"""An `M` layer with local memories, and one whose memory begins anew every shard (TNT, arXiv 2511.07343)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from atlas_kernels.layer_start import gate_widths
from atlas_megatron.config import Config
from atlas_megatron.config.presets import PRESETS
from atlas_megatron.mixers.base import Mode, in_mode
from atlas_megatron.mixers.memory import AtlasMixer
from atlas_megatron.mixers.stream import StreamContext
from tests.support.single_mixer import build_mixer
from tests.support.small_model import SMALL

STALE = {"read": "chunk", "projection": True}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "shards": ("M-", {"shard": 16}),
    "atlas": ("M-", {"locals": ("2/4", "4/16", "2/4"), **STALE, "ns_period": 4}),
    "titans, in a block with attention": ("A-*-", {**PRESETS["titans"], "locals": ("4/8",), **STALE}),
    "all anew": ("M-", {**PRESETS["omeganet"], "shard": 8, "locals": ("2/16",)}),
}


def config(pattern: str = "M", **memory: Any) -> Config:
    return replace(SMALL, model=replace(SMALL.model, pattern=pattern), memory=replace(SMALL.memory, **memory))


def in_float64(mixer: Any) -> Any:
    mixer.double().config.params_dtype = torch.float64
    return mixer


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("single_process_megatron")
@torch.no_grad()
def test_pieces_of_any_length_are_the_sequence(case: tuple[str, dict[str, Any]]) -> None:
    """Cut in chunks and shards of each memory and at their ends, and token by token."""
    from atlas_megatron.model.build import build_model

    model = in_float64(build_model(config(case[0], **case[1])))
    tokens = torch.randint(64, (2, 27), generator=torch.Generator().manual_seed(3))
    whole = model(tokens, None, None)
    for lengths in ([3, 5, 1, 7, 11], [8, 8, 8, 3], [16, 11], [1] * 27):
        context = StreamContext()
        pieces = [model(piece, None, None, inference_context=context) for piece in tokens.split(lengths, 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("keys", [{"locals": ("2/4", "4/8")}, {"shard": 8}], ids=["locals", "shard"])
@pytest.mark.usefixtures("single_process_megatron")
@torch.no_grad()
def test_an_ablated_layer_is_one_that_writes_nothing(keys: dict[str, Any]) -> None:
    """All memories stand at their starts, whatever was read; and none is written while it is ablated."""
    mixer = in_float64(build_mixer("M", config(write_gate=True, ns_step="sum", **keys)))
    x, more = torch.randn(2, 16, 2, 32, dtype=torch.float64).unbind()
    context = StreamContext()
    mixer(x, context)
    before = context.states[1]
    with in_mode(mixer, ablate=True):
        ablated = mixer(more, context)[0]
    after = context.states[1]
    assert all(torch.equal(a, b) for a, b in zip(before.memory.tensors(), after.memory.tensors(), strict=True))
    assert (after.locals is None) == ("shard" in keys) and after.locals is before.locals
    eta = list(gate_widths(mixer.memory)).index("eta")
    for bias in (mixer.gate_bias, mixer.local_bias):
        if bias is not None:
            bias[..., eta] = -30.0
    # The convolutions go on from the same tokens.
    still = replace(before, memory=None, locals=None)
    context.states[1] = still
    torch.testing.assert_close(mixer(more, context)[0], ablated, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("single_process_megatron")
@torch.no_grad()
def test_a_write_gate_is_each_memorys_own() -> None:
    """A local memory whose gate is shut stays at its start; the others write on."""
    mixer = in_float64(build_mixer("M", config(write_gate=True, ns_step="sum", locals=("2/16", "4/16"))))
    mixer.local_bias[:, 1, list(gate_widths(mixer.memory)).index("eta")] = -30.0
    context = StreamContext()
    mixer(torch.randn(15, 1, 32, dtype=torch.float64), context)
    (written, shut) = context.states[1].locals.memories
    starts = [mixer.local_first, mixer.local_second]
    assert all(torch.equal(w[0], start[:, 1]) for w, start in zip(shut.weights, starts, strict=True))
    assert not any(torch.equal(w[0], start[:, 0]) for w, start in zip(written.weights, starts, strict=True))


@pytest.mark.usefixtures("single_process_megatron")
def test_layers_are_measured_as_any_other() -> None:
    for keys in ({"shard": 8}, {"locals": ("2/8",), **STALE}):
        mixer = build_mixer("M", config(**keys))
        mixer.mode = Mode(measure=True)
        mixer(torch.randn(24, 2, 32))
        assert {"eta_mean", "memory_norm", "surprise_before", "surprise_after"} <= mixer.measurements.keys()
        assert all(value.float().isfinite().all() for value in mixer.measurements.values())


def test_nothing_of_a_shard_goes_over_ranks() -> None:
    """A layer of shards hands nothing on and exchanges nothing; local memories add nothing to what their layer does."""
    plain, anew = config(), config(shard=16)
    beside, both = config(locals=("2/8", "4/16"), **STALE), config(shard=16, locals=("2/8",))
    for position in (0, 13, 16):
        numbers = AtlasMixer.state_numbers(plain, position)
        assert numbers > 0 and AtlasMixer.state_numbers(beside, position) == numbers
        assert AtlasMixer.state_numbers(anew, position) == AtlasMixer.state_numbers(both, position) == 0
    assert AtlasMixer.exchanged_numbers(beside) == AtlasMixer.exchanged_numbers(plain) > 0
    assert AtlasMixer.exchanged_numbers(anew) == AtlasMixer.exchanged_numbers(both) == 0
    # Nor does a rank wait for another one's scan.
    assert AtlasMixer.scan_flops(anew) == AtlasMixer.scan_flops(both) == 0 < AtlasMixer.scan_flops(plain)
    # A halo of the convolutions is all that is left.
    assert AtlasMixer.halos(anew) == AtlasMixer.halos(plain) == AtlasMixer.halos(beside)


@pytest.mark.usefixtures("single_process_megatron")
def test_a_state_is_as_large_as_said() -> None:
    """Numbers of matrices, momenta and spans, as decoding keeps them (anchors and halos are left out there too)."""
    for keys in ({"shard": 16}, {"locals": ("2/8", "4/16", "2/8"), **STALE}):
        settings = config(**keys)
        mixer, context = build_mixer("M", settings), StreamContext()
        with torch.no_grad():
            mixer(torch.randn(8, 1, 32), context)
        state = context.states[1]
        memories = [state.memory, *(state.locals.memories if state.locals else ())]
        held = sum(m.numel() for memory in memories for m in (*memory.weights, *memory.momentum))
        held += sum(span.numel() for span in (state.locals.spans if state.locals else ()))
        assert AtlasMixer.state_size(settings) == held
