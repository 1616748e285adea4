"""The Triton scan against the chunk form in torch: forward, state, every gradient (interpreted without a GPU)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from atlas_kernels import MemoryRule, chunked, omega_memory, op
from tests.support.device_problems import CHUNK, DEVICE, compare, compare_rounded, rounded, small
from tests.support.problems import assert_close, gradients, state_tensors

BASE = MemoryRule(window=5, chunk=CHUNK, ns_steps=0, norm="layer")

# The interpreter's sigmoid of a very negative number: 1 / (1 + inf), which is right.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "sum"])
@pytest.mark.parametrize("loss", ["l2", "dot"])
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("memory", ["mlp", "gated_mlp"])
def test_every_rule(memory, norm, loss, momentum):
    compare(small(replace(BASE, memory=memory, norm=norm, loss=loss, momentum=momentum), 2 * CHUNK + 5))


@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "sum"])
@pytest.mark.parametrize("memory", ["mlp", "gated_mlp"])
@pytest.mark.parametrize("share", [0, 0.3])
def test_outer_gradient_in_part_through_the_anchors(memory, momentum, share):
    rule = replace(BASE, memory=memory, momentum=momentum, anchor_gradient=share)
    compare(small(rule, 2 * CHUNK + 5, pair=momentum))


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("window", [1, 5, CHUNK + 3])
def test_lengths_and_windows(tokens, window):
    compare(small(replace(BASE, window=window), tokens, pair=window != 5, seed=tokens))


@pytest.mark.parametrize("memory", ["mlp", "gated_mlp"])
def test_without_residual(memory):
    compare(small(replace(BASE, memory=memory, window=4, residual=False), CHUNK + 3))


@pytest.mark.parametrize("memory", ["mlp", "gated_mlp"])
def test_several_heads_residual_and_widths_between_powers_of_two(memory):
    rule = replace(BASE, memory=memory, window=4)
    compare(small(rule, CHUNK + 3, batch=2, heads=3, residual=True, key=48, value=32, hidden=48))
    compare(small(rule, CHUNK + 3, residual=True, pair=False, key=32, value=48, hidden=16))


def test_segments_that_are_recomputed(monkeypatch):
    monkeypatch.setattr(chunked, "HELD_BYTES", 0)
    monkeypatch.setattr(chunked, "SEGMENT_BYTES", 0)
    compare(small(BASE, 5 * CHUNK + 2))


def test_gates_of_exactly_zero():
    p = small(replace(BASE, window=3), 2 * CHUNK + 1)
    with torch.no_grad():
        p.gates.alpha[:, 3::5] = 0.0
        p.gates.theta[:, 2::4] = 0.0
        p.gates.gamma[:, 7] = 0.0
    compare(p)


@pytest.mark.parametrize("momentum,pair,residual", [(True, True, False), (False, False, True)])
def test_any_cut_gives_the_whole(momentum, pair, residual):
    p = small(replace(BASE, momentum=momentum), 2 * CHUNK + 5, pair=pair, residual=residual)
    y, state = p.run("chunked")
    whole = {"y": y, **state_tensors(state)}
    whole |= gradients(list(whole.values()), p.leaves())
    for at in (1, CHUNK - 1, CHUNK, CHUNK + 3, 2 * CHUNK):
        first, middle = p.run("triton", 0, at)
        second, state = p.run("triton", at, None, middle)
        parts = {"y": torch.cat([first, second], 1), **state_tensors(state)}
        assert_close(parts | gradients(list(parts.values()), p.leaves()), whole)


def test_the_states_own_gradients():
    """With respect to an incoming state, cut inside a chunk, whose anchor is not its weights."""
    p = small(BASE, 3 * CHUNK, pair=False)
    _, start = p.run("chunked", 0, CHUNK + 3)
    start = start.map(lambda t: t.detach().clone().requires_grad_())
    results = {}
    for impl in ("chunked", "triton"):
        y, state = p.run(impl, CHUNK + 3, None, start)
        results[impl] = gradients([y, *state.tensors()], state_tensors(start))
    assert_close(results["triton"], results["chunked"])
    assert all(g.abs().max() > 0 for g in results["triton"].values())


def test_without_gradients_the_same_bits():
    p = small(BASE, 2 * CHUNK + 5)
    y, state = p.run("triton")
    with torch.no_grad():
        again, after = p.run("triton")
    assert torch.equal(y, again)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), after.tensors(), strict=True))


def test_causal_to_the_bit():
    before, _ = small(BASE, 3 * CHUNK).run("triton")
    for t in (0, 5, CHUNK, CHUNK + 3):
        changed = small(BASE, 3 * CHUNK)
        with torch.no_grad():
            for leaf in (changed.q, changed.k, changed.v, *vars(changed.gates).values()):
                leaf[:, t] *= 0.5
        after, _ = changed.run("triton")
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("memory", ["mlp", "gated_mlp"])
def test_half_precision_products(memory, momentum):
    rule = replace(BASE, memory=memory, momentum=momentum)
    compare_rounded(small(rule, 2 * CHUNK + 5), torch.float16)


@pytest.mark.parametrize(
    "rule,sizes,message",
    [
        (MemoryRule("linear", ns_steps=0), {}, "covers memory='mlp' and 'gated_mlp' of kernel='lifted', not 'linear'"),
        (replace(BASE, momentum=False, kernel="softmax"), {}, "not 'mlp' of 'softmax'; take impl='chunked'"),
        (BASE, {"dtype": torch.float64}, "computes in float32, and the weights are float64"),
        (BASE, {"key": 24, "value": 24}, "multiples of 16 up to 128, not D=24, V=24"),
        (BASE, {"hidden": 40}, "F that is a multiple of 16, not F=40"),
        (replace(BASE, chunk=128), {}, "chunk up to 64 and chunk . window - 1 up to 128, not chunk=128, window=5"),
        (replace(BASE, chunk=64, window=66), {}, "not chunk=64, window=66"),
        (replace(BASE, chunk=64), {}, "float32 products covers chunk . window - 1 up to 64, D and V up to 64, not"),
        (BASE, {"key": 128, "value": 128}, "with float32 products covers .*, not chunk=16, window=5, D=128"),
    ],
)
def test_what_no_kernel_covers(rule, sizes, message):
    with pytest.raises(ValueError, match=f"^impl='triton' .*{message}"):
        small(rule, 3, **sizes).run("triton")


def test_packed_documents():
    """Borders in one row and in all, at a chunk's border and in it, in the call's first chunk and at its end."""
    p = small(BASE, 2 * CHUNK + 3, batch=2)
    lengths = [[3, 9, CHUNK, 7], [CHUNK, CHUNK + 3]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).to(DEVICE)
    results = []
    for impl in ("triton", "chunked"):
        y, state = omega_memory(p.q, p.k, p.v, p.gates, p.weights, p.rule, impl=impl, positions=positions)
        outputs = {"y": y, **state_tensors(state)}
        results.append(outputs | gradients(list(outputs.values()), p.leaves()))
    assert_close(*results)


def test_rounded_products_of_float32_inputs():
    """What a model in bfloat16 asks for: float16 here, where the interpreter is exact."""
    low, _ = rounded(small(BASE, CHUNK + 5), torch.float16)
    high = replace(low, q=low.q.float(), k=low.k.float(), v=low.v.float())
    expected, _ = low.run("triton")
    found, _ = omega_memory(
        high.q, high.k, high.v, high.gates, high.weights, BASE, impl="triton", products=torch.float16
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.half(), expected, rtol=0, atol=0)
    exact, _ = high.run("triton")
    assert not torch.equal(found, exact)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu(monkeypatch, caplog):
    p = small(BASE, 3)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="impl='triton' needs a CUDA GPU, and q lies on cpu; take impl='chunked'"):
        p.run("triton")
    monkeypatch.setattr(op, "_announced", set())
    with caplog.at_level("INFO", "atlas_kernels"):
        p.run("auto")
        p.run("auto")
    assert caplog.messages == ["omega_memory: impl='auto' chose 'chunked': 'triton' is for tensors on a GPU"]


@pytest.mark.parametrize("momentum,pair", [(True, False), (False, True)])
def test_shards(momentum, pair):
    """Whole shards lie side by side in the batch; a begun one comes first and last."""
    p = small(replace(BASE, momentum=momentum, shard=CHUNK), 2 * CHUNK + 3, pair=pair)
    compare(p)
    _, middle = p.run("chunked", 0, 5)
    found = {impl: {"y": p.run(impl, 5, None, middle)[0]} for impl in ("triton", "chunked")}
    assert_close(found["triton"], found["chunked"])
