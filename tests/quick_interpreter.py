"""Triton's interpreter without what it does in vain, which is most of what it does with small tiles.

Whenever one kernel function calls another it looks through all of `triton.language` for what is to be replaced, though
nothing is left to replace; it works out whether integers overflow, and asserts it only in debug mode, where it is not;
and it makes the table of numpy's dtypes anew for each value. What kernels compute is the same, bit by bit.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    found = {package: _builtins(package) for package in _packages()}

    def patch(package: object, builder: object, scope: object) -> None:
        for name in found[package]:
            if tl.core.is_builtin(member := getattr(package, name)):  # not within another kernel function
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch
    interpreter._get_np_dtype = _remembering(interpreter._get_np_dtype)
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _packages() -> tuple[object, ...]:
    """All that the interpreter patches."""
    return tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base


def _builtins(package: object) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def _remembering(numpy_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def remembered(dtype: Any) -> Any:
        name = dtype.scalar.name  # that of a pointer, or of what a block consists of
        if name not in known:
            known[name] = numpy_dtype(dtype)
        return known[name]

    return remembered
