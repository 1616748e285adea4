"""benchmarks.trainers: contenders of equal parameters, and what it refuses."""

from __future__ import annotations

import pytest

from atlas_megatron.config import load
from benchmarks import trainers
from experiments.shared.protocol import parameters


@pytest.mark.parametrize("length", trainers.LENGTHS)
def test_contenders_are_equal_in_parameters_and_tokens(length: int) -> None:
    configs = [load(trainers.BASE, trainers.words_of(name, length)) for name in trainers.CONTENDERS]
    sizes = [parameters(config) for config in configs]
    assert max(sizes) <= 1.01 * min(sizes)
    assert {c.train.global_batch * c.model.seq_length for c in configs} == {trainers.TOKENS}


def test_a_length_that_divides_no_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainers.main(["--lengths", "3000"]) == 2
    said = capsys.readouterr().err
    assert "--lengths 3000: give divisors of 8192" in said or "run make quickstart first" in said
