"""Triton's interpreter without what it does in vain, which is most of what it does with small tiles.

Whenever one kernel function calls another it looks through all of `triton.language` for what is to be replaced, though
nothing is left to replace; it works out whether integers overflow, and asserts it only in debug mode, where it is not;
and it makes the table of numpy's dtypes anew for each value. What kernels compute is the same, bit by bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    interpreter._patch_lang = _once(interpreter._patch_lang)
    interpreter._get_np_dtype = _remembering(interpreter._get_np_dtype)
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _once(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Nothing where a kernel that runs has replaced already all that the function sees."""
    unpatched = {language: language.range for language in (tl, tl.core)}
    visible: dict[Any, list[Any]] = {}

    def patch(function: Any) -> Any:
        if function not in visible:
            names = function.__globals__.values()
            visible[function] = [language for language in unpatched if any(value is language for value in names)]
        if tl.range is unpatched[tl] or any(seen.range is unpatched[seen] for seen in visible[function]):
            return patch_lang(function)
        return interpreter._LangPatchScope()

    return patch


def _remembering(numpy_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        name = dtype.scalar.name  # that of a pointer, or of what a block consists of
        if name not in known:
            known[name] = numpy_dtype(dtype)
        return known[name]

    return remembered
