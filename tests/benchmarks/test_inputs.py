"""What a benchmark needs and does not find ends it in one line, before anything is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
UKP = ("train.jsonl.gz", "train.strict_ids.txt.gz", "dev.jsonl.gz", "dev.strict_ids.txt.gz")


def checked(*names: str, **environment: str) -> str:
    """What `inputs.check` says on stderr; empty where all is there."""
    program = f"import inputs; inputs.check(*{names!r})"
    path = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == (1 if done.stderr else 0) and done.stdout == ""
    return done.stderr


def test_what_is_absent_is_named_with_what_to_do(tmp_path: Path) -> None:
    said = checked("decoder", "ukpconvarg1", PLAUDIT_SHARED_DATA=str(tmp_path))
    assert said.count("\n") == 1 and said.startswith(f"error: {tmp_path}/ukpconvarg1/train.jsonl.gz is needed: set ")
    assert "PLAUDIT_SHARED_DATA" in said and "ukpconvarg1/dev.strict_ids.txt.gz" in said
    assert "hh_rlhf/*/half_a" in checked("hh_rlhf", PLAUDIT_SHARED_DATA=str(tmp_path))
    assert checked("no_such_package") == "error: the package no_such_package is needed: pip install no-such-package\n"
    assert "`plaudit train starter`" in checked("starter", PLAUDIT_HOME=str(tmp_path))


def test_what_is_there_passes(tmp_path: Path) -> None:
    (tmp_path / "ukpconvarg1").mkdir()
    for name in UKP:
        (tmp_path / "ukpconvarg1" / name).touch()
    assert checked("decoder", "ukpconvarg1", "pytest", PLAUDIT_SHARED_DATA=str(tmp_path)) == ""


@pytest.mark.parametrize(
    "script",
    ["convincing_arguments.py", *(pytest.param(f"{name}.py", marks=pytest.mark.soak)
                                  for name in ("parity", "quality", "http_loads", "threads"))],
)  # fmt: skip
def test_a_benchmark_looks_before_it_runs(script: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "PLAUDIT_SHARED_DATA": str(tmp_path), "PLAUDIT_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", str(BENCHMARKS / script)], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
