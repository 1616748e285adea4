"""What the pictures of a run say."""

from __future__ import annotations

import numpy
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
