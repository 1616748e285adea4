"""Gradients over the cuts are those of one whole reading; where they are cut off, those of the windows alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from atlas_megatron.finetune.segments import (
    IGNORED,
    SegmentReader,
    Window,
    segments_with_targets,
    shifted,
    widened,
    windows,
)
from atlas_megatron.hf.export import described
from atlas_megatron.hf.modeling_atlas import AtlasForCausalLM
from tests.support.hf_and_megatron import CALM, moved, settings, tokens

# transformers takes the loss in float32, whatever the model is in.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
LENGTH, SEGMENT = 45, 12
MODELS = {
    "every layer": settings("M-*-F-A-C-R-L-D-G-", **CALM),
    "Newton-Schulz": settings("M-M-"),
    "exponential": settings("M-C-", preset="dot", window=5),
}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def labelled() -> tuple[Tensor, Tensor]:
    """Sequences, and their labels: all of one, an answer of the other, over a cut."""
    read = tokens(2, LENGTH)
    labels = read.clone()
    labels[:, 0] = IGNORED
    labels[1, : 2 * SEGMENT - 3] = IGNORED
    return read, labels


def whole(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    read, labels = labelled()
    loss = model(read, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


def in_windows(model: nn.Module, detach_every: int, *, checkpointing: bool) -> tuple[Tensor, dict[str, Tensor]]:
    reader = SegmentReader(model, SEGMENT, checkpointing=checkpointing)
    read, labels = labelled()
    targets, memory, total = shifted(labels), None, torch.tensor(0.0)
    count = (labels != IGNORED).sum()
    for window in windows(segments_with_targets(targets, SEGMENT).tolist(), SEGMENT, detach_every):
        piece = slice(window.start, window.stop)
        loss, memory = reader(read[:, piece], targets[:, piece], memory, count)
        loss.backward()
        memory, total = memory.detach(), total + loss.detach()
    return total, gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_over_the_cuts_gradients_are_those_of_the_whole(config: object, checkpointing: bool) -> None:
    model = moved(config).train()  # type: ignore[arg-type]
    for layer in model.modules():
        if hasattr(layer, "gradient_reach"):
            layer.gradient_reach = 0  # the whole is longer than the length of training
    loss, expected = whole(model)
    found_loss, found = in_windows(model, 0, checkpointing=checkpointing)
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    assert_close(found, expected)


@pytest.mark.parametrize("detach_every", [1, 2])
def test_truncated_gradients_are_those_of_each_window_after_what_was_read(detach_every: int) -> None:
    model = moved(MODELS["every layer"]).train()
    loss, everything = whole(model)
    found_loss, found = in_windows(model, detach_every, checkpointing=False)
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)

    # Read the prefix without gradients, in one piece, then the window, in one piece.
    read, labels = labelled()
    targets, size = shifted(labels), detach_every * SEGMENT
    for start in range(0, LENGTH, size):
        with torch.no_grad():
            memory = model(read[:, :start], use_cache=True).past_key_values if start else None
        logits = model(read[:, start : start + size], past_key_values=memory, use_cache=True).logits
        piece = targets[:, start : start + size].flatten()
        lost = torch.nn.functional.cross_entropy(logits.flatten(0, 1), piece, ignore_index=IGNORED, reduction="sum")
        (lost / (labels != IGNORED).sum()).backward()
    assert_close(found, gradients(model))

    # And the truncation shows: in what the first segment wrote for the others to read, not in the output layer's norm.
    def apart(name: str) -> float:
        return float((found[name] - everything[name]).norm() / everything[name].norm())

    assert apart("model.layers.0.mixer.linear_qkvg.weight") > 1e-3
    assert apart("model.norm.weight") < 1e-5


def test_as_many_segments_as_there_are_is_not_truncated() -> None:
    model = moved(MODELS["Newton-Schulz"]).train()
    _, expected = in_windows(model, 0, checkpointing=False)
    _, found = in_windows(model, 4, checkpointing=True)
    assert_close(found, expected)


def test_windows_end_with_the_last_target() -> None:
    assert windows([True] * 4, 8, 0) == [Window(0, 32, True)]
    assert windows([False, True, False, True, False], 8, 2) == [Window(0, 16, True), Window(16, 32, True)]
    assert windows([False] * 4 + [True], 8, 3) == [Window(0, 24, False), Window(24, 40, True)]
    assert windows([True], 8, 3) == [Window(0, 8, True)]


def test_padding_on_the_right_changes_neither_loss_nor_gradients() -> None:
    model = moved(MODELS["every layer"]).train()
    reader = SegmentReader(model, SEGMENT, checkpointing=False)
    read, labels = labelled()
    found = []
    for length in (0, 60):
        tokens_, targets = widened(read, shifted(labels), length)
        assert tokens_.shape == targets.shape == (2, max(LENGTH, length))
        loss, _ = reader(tokens_, targets, None, torch.tensor(10))
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    assert_close(found[1][1], found[0][1])
    assert segments_with_targets(widened(read, shifted(labels), 60)[1], SEGMENT).tolist() == [True] * 4 + [False]


def test_gradients_on_sixteen_times_the_length_of_training_keep_their_size() -> None:
    """Detached at every cut, and inside of a segment after a quarter of the length of training."""
    config = settings("M-C-", **CALM, eta_sum=0.5)

    def norm(length: int, segment: int, reach: int, detach_every: int) -> float:
        torch.manual_seed(0)
        reader = SegmentReader(AtlasForCausalLM(described(config)), segment, checkpointing=False, reach=reach)
        read, memory = tokens(1, length), None
        targets = shifted(read)
        for window in windows([True] * (length // segment), segment, detach_every):
            piece = slice(window.start, window.stop)
            loss, memory = reader(read[:, piece], targets[:, piece], memory, torch.tensor(length - 1))
            loss.backward()
            memory = memory.detach()
        return float(torch.nn.utils.clip_grad_norm_(reader.parameters(), 1e30))

    trained = config.model.seq_length
    usual = norm(trained, trained, 0, 0)
    for segment in (trained, 4 * trained):
        assert norm(16 * trained, segment, trained // 4, 1) < 100 * usual
    assert not norm(16 * trained, trained, 0, 0) < 100 * usual
