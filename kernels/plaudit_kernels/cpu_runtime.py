"""How the fused CPU kernels are compiled and run: Numba compiles them, OpenMP's threads, those of torch, run them.

A kernel is a function of one table of int64: slot 0 counts the pieces of work that have been taken, the others hold
addresses, sizes and, by their bits, float64 settings; the last three say where each thread's memory lies. Every thread
takes pieces until none is left. Torch's own team of threads is used because a second team would wait by spinning on the
cores that the first one needs.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import struct
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16)

Kernel = Callable[[Any], None]

_LINE = 16
"""Words of a cache line: what one thread writes must not lie in another's."""

_compiling = threading.Lock()


class _Scratch(threading.local):
    """Memory for one launch: the same for all that a Python thread makes, as each ends before the next begins. Kernels
    allocate nothing themselves: there a lack of memory could not be raised."""

    memory = torch.empty(0, dtype=torch.int32)

    def of(self, words: int) -> torch.Tensor:
        if self.memory.numel() < words:
            self.memory = torch.empty(words, dtype=torch.int32, device="cpu")  # whatever the default is
        return self.memory


_scratch = _Scratch()


@cache
def unavailable() -> str:
    """Why the fused CPU kernels cannot run in this process; empty if they can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return "torch's threads are not GNU OpenMP's"
    return ""


def unit(dtype: torch.dtype) -> str:
    """The vector unit that decides the bits of CPU operations, by name; in bf16 also whether it has bf16 itself."""
    name = torch.backends.cpu.get_cpu_capability().lower()
    return f"{name}_bf16" if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported() else name


def launch(kernel: Kernel, *arguments: torch.Tensor | int | float, words: int = 0) -> None:
    """Run `kernel` over the arguments, from slot 1 on: the address of a tensor, an integer, the bits of a float. With
    `words` each thread has as many of four bytes to itself; the three slots behind the arguments say where."""
    threads = torch.get_num_threads()
    words += -words % _LINE
    memory = _scratch.of(words * threads)
    table = (ctypes.c_int64 * (len(arguments) + 4))(0, *map(_slot, arguments), memory.data_ptr(), words, 0)
    _parallel()(_address(kernel), ctypes.addressof(table), threads, 0)


def _slot(value: torch.Tensor | int | float) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return int(struct.unpack("q", struct.pack("d", value))[0])
    return value


@cache
def _parallel() -> Any:
    """OpenMP's entry: run a function with one argument on every thread of the team. It lets go of the GIL."""
    parallel = ctypes.CDLL(None).GOMP_parallel
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


@cache
def _address(kernel: Kernel) -> int:
    """The address of the compiled kernel. Compiled code is kept on disk, in a folder for these very sources: Numba
    by itself looks at the kernel's file alone, not at what the kernel calls."""
    import numba

    signature = numba.types.void(numba.types.CPointer(numba.types.int64))
    with _compiling:
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(_cache_folder())
        try:
            compiled = numba.cfunc(signature, cache=True)(kernel)
        except RuntimeError:  # nowhere to write: compile at every start
            compiled = numba.cfunc(signature)(kernel)
        finally:
            numba.config.CACHE_DIR = before
    _kept.append(compiled)
    return int(compiled.address)


_kept: list[Any] = []
"""Compiled kernels: their code lives as long as they do."""


def _cache_folder() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("cpu_*.py")))
    return home / "plaudit" / f"cpu-kernels-{hashlib.sha256(sources).hexdigest()[:16]}"
