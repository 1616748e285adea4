"""Every key of the configuration with values that nobody means: refused in a line with the key, or taken."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from atlas_megatron.config import Config, load
from atlas_megatron.config.checks import validate
from atlas_megatron.config.values import parse_word, typed
from atlas_megatron.estimate import room

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.toml"
VALUES = (
    "-1", "0", "1000003", "1152921504606846976", "9223372036854775807", "1" * 400, "0.5", "1e300", "nan", "-inf",
    "true", "[1]", '""', "x\ny = 1", "$(id)", "../..", "{a=1}", "\0",
)  # fmt: skip


@pytest.mark.parametrize("section", [section.name for section in fields(Config)])
def test_no_value_of_a_key_is_more_than_a_line(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "memory_of_a_process", lambda: 64 << 30)
    usual = load(CONFIG)
    values = getattr(usual, section)
    for field in fields(values):
        for word in VALUES:
            key, kind = f"{section}.{field.name}", type(getattr(values, field.name))
            try:
                value = typed(key, parse_word(word, kind), kind if kind is not tuple else tuple[str, ...])
                config = replace(usual, **{section: replace(values, **{field.name: value})})
                validate(config, 1)
                room.check_training(config, 1)
                room.check_reading(config)
            except ValueError as error:
                assert "\n" not in str(error), key  # noqa: PT017  most are taken
            except Exception as error:  # noqa: BLE001
                pytest.fail(f"{key}={word[:30]!r}: {type(error).__name__}: {error}")


@pytest.mark.parametrize(
    "words",
    [
        ["attention.persistent=1000000000"], ["model.hidden_size=1048576", "model.ffn_hidden_size=1048576"],
        ["model.vocab_size=1000000000000"], ["train.micro_batch=1000000000", "train.global_batch=1000000000"],
        ["train.validate_sequences=1000000000000"],
    ],
    ids=lambda words: words[0].partition("=")[0],
)  # fmt: skip
def test_what_no_machine_holds_is_refused_with_its_size(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "memory_of_a_process", lambda: 64 << 30)
    batch = ["train.validate_sequences=1000000000"] if "micro_batch" in words[0] else []
    with pytest.raises(ValueError, match=r"would take (about )?\S+ GiB"):
        validated = load(CONFIG, [*words, *batch])
        validate(validated, 1)
        room.check_training(validated, 1)


def test_what_a_machine_may_hold_is_not_refused() -> None:
    for path in sorted(CONFIG.parent.glob("atlas-*.toml")):
        room.check_reading(load(path))
    room.check_training(load(CONFIG), 1)
