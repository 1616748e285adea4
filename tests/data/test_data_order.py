"""The order of the training samples: a longer run goes on with what comes next, and nothing is left out."""

from __future__ import annotations

import pickle

import pytest

from atlas_megatron.data.order import TrainingOrder


def order(sizes: list[int], weights: list[float], samples: int, seed: int = 5) -> TrainingOrder:
    sets = [[f"{name}{number}" for number in range(size)] for name, size in zip("abc", sizes, strict=False)]
    return TrainingOrder(sets, weights, seed, samples)


@pytest.mark.parametrize(("sizes", "weights"), [([7], [3.0]), ([7, 5], [0.7, 0.3]), ([4, 9, 6], [1.0, 1.0, 5.0])])
def test_a_longer_order_begins_with_the_shorter_one(sizes: list[int], weights: list[float]) -> None:
    short, long = order(sizes, weights, 30), order(sizes, weights, 200)
    assert (len(short), len(long)) == (30, 200)
    assert [short[n] for n in range(30)] == [long[n] for n in range(30)]
    # Batches that were passed over make a run read on behind its length.
    assert [short[n] for n in range(150, 200)] == [long[n] for n in range(150, 200)]


def test_each_pass_holds_every_sample_once_in_an_order_of_its_own() -> None:
    passes = order([40], [1.0], 200)
    read = [[passes[n] for n in range(start, start + 40)] for start in (0, 40, 80)]
    assert all(sorted(one) == sorted(read[0]) for one in read)
    assert len({tuple(one) for one in read}) == 3
    assert [order([40], [1.0], 200, seed=6)[n] for n in range(40, 80)] != read[1]


def test_a_blend_draws_by_weight_from_its_start_on() -> None:
    blend = order([10, 10], [3.0, 1.0], 100)
    drawn = [blend[n][0] for n in range(100)]
    assert drawn.count("a") == 75 and drawn[:20].count("a") == 15


def test_it_travels_to_a_loader_process() -> None:
    one = order([7, 5], [0.7, 0.3], 60)
    other = pickle.loads(pickle.dumps(one))
    assert [other[n] for n in range(60)] == [one[n] for n in range(60)]
