"""docs/rewards.md says what `rewards.toml` takes: every kind, every key, every default, and an example that is read."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from plaudit.rewards.config import KINDS, Term, read_rewards

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    part = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"][2:]


def shown(default: object) -> str:
    if default is MISSING or default is None:
        return "none" if default is None else "needed"
    return str(default).lower() if isinstance(default, bool) else str(default)


def test_every_kind_has_its_keys_with_their_defaults() -> None:
    said: dict[str, dict[str, str]] = {}
    for kind, _, key, default, _ in rows("Kinds"):
        said.setdefault(kind.strip("`") or list(said)[-1], {})[key.strip("`")] = default
    common = {field.name for field in fields(Term)}
    assert said == {
        kind: {f.name: shown(f.default) for f in fields(term) if f.name not in common} for kind, term in KINDS.items()
    }


def test_the_keys_of_every_term_are_all_there() -> None:
    assert [key.strip("`") for key, *_ in rows("Keys of every term")] == ["kind", *(f.name for f in fields(Term))]


def test_the_example_is_read(tmp_path: Path) -> None:
    pytest.importorskip("regex", reason="pip install 'plaudit[rewards]'")
    (tmp_path / "rewards.toml").write_text(re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0])
    rewards = read_rewards(tmp_path / "rewards.toml")
    assert (rewards.name, rewards.floor, len(rewards.terms)) == ("hours", -5.0, 3)
