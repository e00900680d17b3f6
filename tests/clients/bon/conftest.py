"""`plaudit bon` as it is typed, and files of samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from plaudit import cli
from plaudit.bon.samples import sample_key

ENTRIES = {"bon": EntryPoint("bon", "plaudit.bon.cli:app", cli.GROUP)}
SETTINGS = {"policy": "p", "temperature": 1.0}


@pytest.fixture
def bon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`bon(*args)` is (exit code, standard output, standard error), in an empty current directory."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        code = cli.run(("bon", *args), ENTRIES)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def write() -> Callable[..., str]:
    """`write("name.jsonl", rows)` writes rows, one line each, into the current directory."""

    def to_file(name: str, rows: list[dict[str, Any]]) -> str:
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return name

    return to_file


@pytest.fixture
def read() -> Callable[[str], list[dict[str, Any]]]:
    """`read("name.jsonl")` is the rows of a file, read as a trainer's JSON loader does: one object a line."""
    return lambda name: [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def samples() -> Callable[..., list[dict[str, Any]]]:
    """`samples(prompts, n)` is rows as `bon generate` writes them; `scores` puts a score on each."""

    def rows(prompts: int, n: int, scores: Callable[[int, int], float | None] | None = None) -> list[dict[str, Any]]:
        made = []
        for p in range(prompts):
            for i in range(n):
                prompt = f"prompt {p}"
                row = {"key": sample_key(prompt, SETTINGS, i), "line": p + 1, "index": i, "prompt": prompt}
                row |= {"response": f"answer {i} to {p}", "sampling": SETTINGS}
                if scores is not None:
                    number = scores(p, i)
                    row |= {"score": number} if number is not None else {"score": None, "error": {"code": "too_long"}}
                made.append(row)
        return made

    return rows
