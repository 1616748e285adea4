"""What a memory layer launches at the shapes that are trained, held to kernels/launches.json."""

from __future__ import annotations

import json

import pytest

from benchmarks import launches


def kept() -> dict[str, dict]:
    return json.loads(launches.TABLE.read_text(encoding="utf-8"))["launches"]


@pytest.mark.slow
def test_no_layer_launches_more_than_its_table() -> None:
    bad, _ = launches.faults(launches.count_all(), kept())
    assert not bad


@pytest.mark.parametrize("name", ["configs/quickstart", "configs/experiments/language_model"])
def test_no_small_layer_launches_more_than_its_table(name: str) -> None:
    counted = launches.of_config(name)
    bad, _ = launches.faults(counted, {row: of for row, of in kept().items() if row in counted})
    assert not bad and any(of["kernels"] for of in counted.values())


def test_what_is_shipped_and_trained_is_in_the_table() -> None:
    table = kept()
    assert set(launches.SHAPES) <= set(table)
    assert {"configs/atlas-170m: memory", "configs/atlas-340m: memory", "configs/quickstart: output"} <= set(table)
    # A read of the chunk's start and chunks of 256 are large products, which torch has.
    torchs = {"configs/atlas-340m-tnt: memory", "configs/experiments/tnt: memory"}
    assert {name for name, of in table.items() if "refused" in of} == torchs


def test_what_grew_is_named() -> None:
    row = {"kernels": {"write": 2, "read": 1}, "torch": 10, "torch_bytes": 5000}
    assert launches.faults({"a": row}, {"a": row}) == ([], [])
    bad, good = launches.faults({"a": row | {"torch": 11, "kernels": {"write": 2}}}, {"a": row})
    assert bad == ["a: torch operators grew from 10 to 11"]
    assert good == ["a: kernel launches shrank from 3 to 2"]
    bad, _ = launches.faults({"a": {"refused": "F is too large"}, "b": row}, {"a": row, "c": row})
    assert bad == [
        "a: F is too large", "b: only counted; run with --write", "c: only in launches.json; run with --write"
    ]  # fmt: skip
