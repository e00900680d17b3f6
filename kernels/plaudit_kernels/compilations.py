"""What Triton compiles, seen as it happens: a kernel that is compiled while requests wait was not warmed up."""

from __future__ import annotations

from typing import Any

try:
    import triton
except ImportError:
    triton = None


def watch_compilations() -> list[str]:
    """A list to which every kernel is added that Triton builds in this process from now on, or reads from its cache on
    disk: its name and what it was specialised for. The owner takes out what it has seen.

    Without Triton, and in its interpreter, nothing is ever compiled. A hook that was there before is called as well.
    """
    seen: list[str] = []
    if triton is not None:
        before = triton.knobs.runtime.jit_post_compile_hook

        def hook(**event: Any) -> Any:
            seen.append(_described(event["fn"], event["compile"]))
            return before(**event) if before else None

        triton.knobs.runtime.jit_post_compile_hook = hook
    return seen


def _described(function: Any, build: dict[str, Any]) -> str:
    """`module.kernel[4 warps](rows: i32, stride: i32/16, WIDTH=64)`; /16 are multiples of 16."""
    constants, [aligned] = build["constants"], build["configs"]
    arguments = []
    for index, (name, kind) in enumerate(build["signature"].items()):
        if kind == "constexpr":
            arguments.append(f"{name}={constants.get((index,))}")
        else:
            arguments.append(f"{name}: {kind}" + ("/16" if aligned.get((index,)) else ""))
    return f"{function.module}.{function.name}[{build['num_warps']} warps]({', '.join(arguments)})"
