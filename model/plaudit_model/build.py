"""Which code computes a score: an id that changes with every source that can move its bits."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable

FORWARD = (
    "decoder", "encoder_trunk", "heads", "module_trunk", "packed", "packing", "padded_trunk", "projection",
    "reward_model", "rope", "trunk",
)  # fmt: skip
"""The modules of this package that a forward runs through; every source of plaudit_kernels counts."""


@lru_cache(maxsize=1)
def kernel_build() -> str:
    """The first 8 hex digits of the sha256 over the names and contents of those files."""
    return hash_of(files("plaudit_kernels"), files(__package__))


def hash_of(kernels: Traversable, model: Traversable) -> str:
    """The same of two package folders."""
    sources = [entry for entry in kernels.iterdir() if entry.name.endswith((".py", ".cpp", ".h"))]
    sources += [model / f"{name}.py" for name in FORWARD]
    digest = hashlib.sha256()
    for source in sorted(sources, key=lambda source: source.name):
        digest.update(source.name.encode() + b"\0" + hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()[:8]
