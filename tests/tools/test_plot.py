"""What the pictures of a run say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
from matplotlib import pyplot

import plot


def test_the_loss_along_the_context_is_that_of_the_context_alone() -> None:
    """Whatever its tokens cost, and however much the first of them lack a context."""
    stride, cuts = 8, 6
    tokens = numpy.random.default_rng(0).normal(5, 1, stride)
    context = numpy.where(numpy.arange(stride * cuts) < 5, 0.8, 0.0)
    figure, axes = pyplot.subplots()
    plot._draw_positions(axes, numpy.tile(tokens, cuts) + context, stride)
    line, means = axes.get_lines()
    numpy.testing.assert_allclose(line.get_ydata(), context + tokens.mean())
    assert means.get_ydata()[0] > means.get_ydata()[-1]
    pyplot.close(figure)


def records(steps: int, bits: float | None, **more: object) -> list[dict[str, object]]:
    """Of a run whose nats are so many bits per byte; None: without validation."""
    made: list[dict[str, object]] = [
        {"step": step, "loss": 5.0 - step / steps, "tokens": 768 * step, **more} for step in range(1, steps + 1)
    ]
    if bits is not None:
        made[-1] |= {"validation_loss": 4.0, "validation_bits_per_byte": 4.0 * bits}
    return made


def test_a_short_run_has_a_smoothed_line_and_a_unit_that_can_be_read() -> None:
    figure, axes = pyplot.subplots()
    plot._draw_loss(axes, records(12, 0.5))
    assert [line.get_label() for line in axes.get_lines()] == ["each training step", "mean of 4 steps", "validation"]
    assert axes.get_xlabel() == "tokens seen (thousands)"
    assert axes.xaxis.get_major_formatter()(0.002, None) == "2"
    pyplot.close(figure)
    assert [plot._tokens_in(most)[1] for most in (900, 2e6, 3e10)] == [
        "tokens seen", "tokens seen (millions)", "tokens seen (billions)",
    ]  # fmt: skip


def test_runs_of_different_tokenizers_are_compared_in_bits_per_byte() -> None:
    same = plot._panels({"a": records(9, 0.5), "b": records(9, 0.5)})
    assert {title: unit for title, (unit, _) in same.items()} == {
        "training loss, smoothed": "nats per token",
        "validation loss": "nats per token",
        "validation bits per byte": "bits per byte",
    }
    other = plot._panels({"a": records(9, 0.5), "b": records(9, 0.4)})
    assert {unit for unit, _ in other.values()} == {"bits per byte"} and "validation loss" not in other
    figure, axes = pyplot.subplots()
    other["training loss, smoothed"][1](axes, records(5, 0.4), "C0", "b")
    assert axes.get_lines()[0].get_ydata() == pytest.approx([0.4 * 4.4])
    pyplot.close(figure)
    with pytest.raises(ValueError, match="different tokenizers, and c has no validation in bits per byte; leave it"):
        plot._panels({"a": records(9, 0.5), "b": records(9, 0.4), "c": records(9, None)})


def test_a_comparison_has_no_empty_panel(tmp_path: Path) -> None:
    for name, layers in (("a", {}), ("b", {"layers": {"1": {"memory_share": 0.4}}})):
        (tmp_path / name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records(9, 0.5, **layers))
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    assert len(plot._panels({"a": records(9, None)})) == 1
    assert plot.compare_runs([tmp_path / "a", tmp_path / "b"]).read_bytes().startswith(b"\x89PNG")
