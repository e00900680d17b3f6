"""The kernel build's id changes with what can move a score's bits, and with nothing that is only near it."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import plaudit_kernels
import plaudit_model
from plaudit_model.build import FORWARD, hash_of, kernel_build
from plaudit_model.reward_model import RewardModel

MODEL = Path(plaudit_model.__file__).parent
KERNELS = Path(plaudit_kernels.__file__).parent


def test_every_module_with_arithmetic_that_a_forward_imports_counts() -> None:
    seen: set[str] = set()
    todo = ["trunk"]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((MODEL / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                named = [node.module] if node.module else [alias.name for alias in node.names]
                todo += [module for module in named if (MODEL / f"{module}.py").is_file()]
    arithmetic = {name for name in seen if "import torch" in (text := (MODEL / f"{name}.py").read_text())
                  or "import numpy" in text}  # fmt: skip
    assert arithmetic | {"reward_model"} == set(FORWARD)


@pytest.mark.parametrize(
    ("edited", "counts"),
    [("plaudit_kernels/matmul.py", True), ("plaudit_model/decoder.py", True), ("plaudit_model/records.py", False)],
)
def test_a_changed_source_changes_it(tmp_path: Path, edited: str, counts: bool) -> None:
    for package in (KERNELS, MODEL):
        shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__", "starter"))
    folders = tmp_path / KERNELS.name, tmp_path / MODEL.name
    assert hash_of(*folders) == kernel_build() and len(kernel_build()) == 8
    with (tmp_path / edited).open("a") as stream:
        stream.write("#")
    assert (hash_of(*folders) != kernel_build()) is counts


def test_numerics_name_it(reward_model_dir: Callable[[str], Path]) -> None:
    model = RewardModel.load(reward_model_dir("bert"), device="cpu")
    assert model.choice is not None
    assert model.numerics.endswith(f"-float32-exact-b32-{model.choice.implementation}.{kernel_build()}")
