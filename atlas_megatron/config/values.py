"""Values of a configuration: from the words of a command line, checked against a field's type, and as TOML."""

from __future__ import annotations

import json
import math
import re
import tomllib
from contextlib import suppress
from typing import Any

SAID = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
LARGEST = 2**63 - 1  # a signed 64-bit number, as tensors and files hold it


def parse_word(text: str, kind: Any) -> Any:
    """A value as it is typed: TOML, or what people write besides it (.99, 1., True); a bare word is a string."""
    try:
        table = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return _loosely(text.strip(), kind)
    value = table["value"] if len(table) == 1 else text  # of several lines
    # A string key keeps its word as typed: log.wandb=2024 and run.directory=2024-05-01 are names.
    return text if kind is str and not isinstance(value, str) else value


def _loosely(text: str, kind: Any) -> Any:
    """A number or a truth value that TOML spells otherwise; else the text as it is."""
    # Python's float() takes more than people mean: "infinity", digits of other scripts.
    if kind in (int, float) and re.fullmatch(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][+-]?\d+)?", text):
        with suppress(ValueError):
            return float(text) if re.search(r"[.eE]", text) else int(text)
    if kind is bool and text in ("True", "False"):
        return text == "True"
    return text


def typed(name: str, value: Any, kind: Any) -> Any:
    """A value of a field of this type. Raises ValueError for one of another type, and for inf, NaN and huge numbers."""
    if kind == tuple[str, ...]:
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ValueError(f'{name}={value!r} must be a list of strings; write {name}=["one", "two"]')
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e3
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        value = float(value)
    # type() and not isinstance(): a bool is an int to Python, not to a config.
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}; it must be {SAID[kind]}")
    if kind in (int, float) and type(value) is int and abs(value) > LARGEST:
        raise ValueError(f"{name}={_short(str(value))} is too large; give a number below 2^63")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} is not finite; give a number")
    if kind is str and "\0" in value:
        raise ValueError(f"{name}={value!r} holds a zero byte; leave it out")
    return value


def toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    # A JSON string is a TOML basic string as long as no character is escaped as a surrogate pair.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:20]}..."
