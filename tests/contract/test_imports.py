"""What may be imported where: nothing generic, no web framework below the server, no torch in the SDK and the front."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["kernels", "server", "training", "clients", "loadtests", "model"])
def test_no_folder_of_this_repository_is_importable(name: str) -> None:
    found = importlib.util.find_spec(name)
    places = [] if found is None else [found.origin, *(found.submodule_search_locations or [])]
    assert not any(place and Path(place).is_relative_to(ROOT / name) for place in places)


LIGHT = {
    "plaudit": ["torch", "numpy", "transformers", "pydantic", "fastapi"],
    "plaudit.bon.cli": ["torch", "numpy", "transformers", "pydantic", "fastapi", "httpx2"],
    "plaudit.judge.cli": ["torch", "numpy", "transformers", "pydantic", "fastapi", "httpx2"],
    "plaudit.rewards.compose": ["torch", "numpy", "transformers", "pydantic", "fastapi", "httpx2", "jsonschema"],
    "plaudit_compose.cli": ["torch", "transformers", "pydantic", "fastapi"],
    "plaudit.cli": ["torch", "numpy", "transformers", "pydantic", "fastapi"],
    "plaudit_model.contract": ["torch", "transformers"],
    "plaudit_model.records": ["torch", "numpy", "transformers"],
    "plaudit_model.encode": ["torch", "transformers"],
    "plaudit_model.infer": ["torch", "transformers"],
    "plaudit_model.starter": ["torch", "transformers"],
    "plaudit_model.cli": ["torch", "transformers"],
    "plaudit_loops.cli": ["torch", "transformers", "numpy"],
    "plaudit_training.cli": ["torch", "transformers"],
    "plaudit_server.cli": ["fastapi", "pydantic", "numpy", "tokenizers", "uvicorn", "torch", "transformers"],
    "plaudit_training.run": ["pydantic", "fastapi", "peft"],  # with plaudit_model.reward_model
}


@pytest.mark.parametrize("module", LIGHT)
def test_an_import_brings_nothing_that_it_should_not(module: str) -> None:
    code = f"import sys, json, {module}; print(json.dumps([m for m in {LIGHT[module]!r} if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == []
