"""L(C) = E + A C^-a through a few points: least squares over a grid of E, error bars by resampled residuals.

For a given E the rest is a line, log(L - E) = log A - a log C, weighted by ((L - E) / L)^2 so that what is minimised
are, to first order, squares of relative residuals log(L / fit). E is the point of a grid from 0 to just below the
lowest loss at which their sum is smallest, found on a coarse grid and then on a finer one around it.

The error bars: the points' residuals, times (n / (n - p))^0.5 for p fitted numbers, are drawn anew with replacement
onto the fitted curve, DRAWS times, and each draw is fitted again; the bars hold the middle 80 % of what came out. With
few points they are too narrow: of synthetic curves with noise of 0.5 % over a factor of 1,000, the exponent lay within
in 61, 66 and 71 % of fits of 4, 5 and 8 points. And they know nothing of what other seeds would have done.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
from numpy import ndarray

DRAWS = 400
MIDDLE = (0.1, 0.9)
LEAST_FOR_LINE, LEAST_FOR_OFFSET = 3, 4
GRID = 64
SEED = 0
FARTHEST = 700.0  # of a logarithm that is a number in float64
# Of C: over less, an exponent is hardly seen.
NARROW = 10.0


@dataclass(frozen=True)
class Fit:
    """One curve, E + B (C / C0)^-a with A = B C0^a, and what resampling gave.

    draws: [DRAWS, 3], E, log B and a of each; notes: what to keep in mind of it.
    """

    offset: float  # E
    at_middle: float  # B
    middle: float  # C0, the geometric mean of the points' C
    exponent: float  # a
    draws: ndarray
    notes: tuple[str, ...]

    @property
    def factor(self) -> float:
        """A."""
        return self.at_middle * self.middle**self.exponent

    def at(self, where: ndarray | float) -> ndarray:
        """The curve at C."""
        return self.offset + self.at_middle * (numpy.asarray(where) / self.middle) ** -self.exponent

    def drawn_at(self, where: ndarray | float) -> ndarray:
        """The resampled curves at C: [DRAWS, *shape of C]."""
        far = numpy.log(numpy.asarray(where, float) / self.middle)
        offset, log_factor, exponent = (column.reshape(-1, *[1] * far.ndim) for column in self.draws.T)
        return offset + numpy.exp(log_factor - exponent * far)

    def interval(self, name: str) -> list[float]:
        """The error bar of `offset`, `exponent` or `factor`."""
        offset, log_factor, exponent = self.draws.T
        drawn = {
            "offset": offset,
            "exponent": exponent,
            "factor": numpy.exp(log_factor + exponent * numpy.log(self.middle)),
        }[name]
        return interval(drawn)

    def where(self, loss: float) -> float | None:
        """The C at which the curve has this loss; None where it lies at or below E, or too far away for a number."""
        if loss <= self.offset:
            return None
        far = numpy.log((loss - self.offset) / self.at_middle) / -self.exponent + numpy.log(self.middle)
        return float(numpy.exp(far)) if abs(far) < FARTHEST else None


def interval(drawn: ndarray) -> list[float]:
    """The middle 80 % of what resampling gave of one number."""
    return [float(value) for value in numpy.quantile(drawn, MIDDLE)]


def fit(compute: list[float], loss: list[float]) -> Fit | str:
    """The curve through the points, or one line on why there is none.

    With three points E is left at 0: three numbers through three points would fit anything.
    """
    where, losses = numpy.array(compute, float), numpy.array(loss, float)
    if not (numpy.isfinite(losses).all() and (losses > 0).all() and (where > 0).all()):
        raise ValueError(f"losses {loss} at {compute} are not all finite and above 0; leave out the run that diverged")
    count = len(set(compute))
    if count < LEAST_FOR_LINE:
        return f"no fit: {count} different points are too few for a power law; {LEAST_FOR_LINE} are the least"
    with_offset = count >= LEAST_FOR_OFFSET
    middle = float(numpy.exp(numpy.log(where).mean()))
    far = numpy.log(where / middle)
    found = _solve(far, losses[None], with_offset=with_offset)[0]
    offset, log_factor, exponent = found
    if exponent <= 0:
        return "no fit: the loss does not fall from the smallest to the largest run"
    curve = offset + numpy.exp(log_factor - exponent * far)
    residuals = numpy.log(losses / curve)
    fitted = 3 if with_offset else 2
    residuals = (residuals - residuals.mean()) * (len(losses) / (len(losses) - fitted)) ** 0.5
    chosen = numpy.random.default_rng(SEED).integers(len(losses), size=(DRAWS, len(losses)))
    draws = _solve(far, curve * numpy.exp(residuals[chosen]), with_offset=with_offset)
    notes = _notes(where, count, draws, offset, with_offset=with_offset)
    return Fit(float(offset), float(numpy.exp(log_factor)), middle, float(exponent), draws, notes)


def _solve(far: ndarray, losses: ndarray, *, with_offset: bool) -> ndarray:
    """E, log B and a [R, 3] for each row of losses [R, n] at log(C / C0) [n]."""
    lowest = losses.min(1, keepdims=True)
    if not with_offset:
        return _best(far, losses, numpy.zeros_like(lowest))
    coarse = numpy.linspace(0, 1, GRID, endpoint=False)
    first = _best(far, losses, lowest * coarse)[:, :1]
    step = lowest / GRID
    # Not up to the lowest loss itself, whose distance from E has no logarithm.
    around = first + step * numpy.linspace(-1, 1, GRID + 1)
    return _best(far, losses, around.clip(0, lowest * (1 - 1e-3 / GRID)))


def _best(far: ndarray, losses: ndarray, offsets: ndarray) -> ndarray:
    """Of each row's candidates for E [R, G], the one with the smallest squares, with its line."""
    above = losses[:, None, :] - offsets[:, :, None]  # [R, G, n]
    weights, logs = (above / losses[:, None, :]) ** 2, numpy.log(above)
    total = weights.sum(-1)
    mean_far, mean_log = (weights * far).sum(-1) / total, (weights * logs).sum(-1) / total
    from_mean = far - mean_far[..., None]
    slope = (weights * from_mean * logs).sum(-1) / (weights * from_mean**2).sum(-1)
    start = mean_log - slope * mean_far
    curve = offsets[:, :, None] + numpy.exp(start[..., None] + slope[..., None] * far)
    squares = (numpy.log(losses[:, None, :] / curve) ** 2).sum(-1)
    rows, best = numpy.arange(len(losses)), squares.argmin(1)
    return numpy.stack([offsets[rows, best], start[rows, best], -slope[rows, best]], axis=1)


def _notes(where: ndarray, count: int, draws: ndarray, offset: float, *, with_offset: bool) -> tuple[str, ...]:
    notes = []
    if not with_offset:
        notes.append(f"{count} points are too few for E: a power law without it (E = 0); 4 are the least")
    elif count == LEAST_FOR_OFFSET:
        notes.append("4 points for 3 numbers: the error bars rest on one degree of freedom")
    if with_offset and (offset == 0 or (draws[:, 0] == 0).mean() > 1 - MIDDLE[1]):
        notes.append("E cannot be told from 0")
    if where.max() / where.min() < NARROW:
        notes.append(f"the points span a factor of {where.max() / where.min():.2g}, less than {NARROW:.0f}")
    return tuple(notes)
