"""Measured rows as tables of a page: what stands between `<!-- name -->` and `<!-- /name -->` is replaced."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import rows


def newest(name: str, *keys: str) -> list[dict[str, str]]:
    """The last row of a results file for each combination of the keys, in the order of their first rows."""
    with (rows.RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list({tuple(row[key] for key in keys): row for row in csv.DictReader(file)}.values())


def cell(row: dict[str, str], name: str) -> str:
    """A number with its interval, if it has one."""
    if row[name] == "":
        return "none"
    value = f"{float(row[name]):.3f}"
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return value if low is None or high is None else f"{value} [{float(low):.3f}, {float(high):.3f}]"


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(page: Path, name: str, text: str) -> None:
    """Put a text into its place. Raises ValueError if the page has none of that name."""
    before = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in before or end not in before:
        raise ValueError(f"{page} has no place named {name}")
    after = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{text}\n\n{end}", before, flags=re.DOTALL)
    page.write_text(after, encoding="utf-8")
