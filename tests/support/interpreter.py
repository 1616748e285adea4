"""Triton's interpreter, quicker by about half: a launch replaces a language module's functions once.

The interpreter does so at every call of one kernel function by another too. There it finds them replaced, and all that
it does is to look through the language's modules, which takes longer than the products of the small tests here.
Nor does it check each sum of integers for overflow, which sizes of a few dozen cannot reach.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from triton import language
from triton.runtime import interpreter


def quicken() -> None:
    """Change the interpreter of this process; nothing where this version of Triton does it in another way."""
    patch = getattr(interpreter, "_patch_lang", None)
    nothing = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or nothing is None:
        return
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    replaced: set[str] = set()

    class Launch(nothing):  # type: ignore[misc, valid-type]
        def restore(self) -> None:
            super().restore()
            replaced.clear()

    def patch_once(fn: Any) -> Any:
        seen = {value.__name__ for value in fn.__globals__.values() if value is language or value is language.core}
        if seen and seen <= replaced:
            return nothing()
        scope = nothing() if replaced else Launch()
        scope._changes = patch(fn)._changes
        replaced.update(seen)
        return scope

    interpreter._patch_lang = patch_once
