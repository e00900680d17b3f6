"""What a load test leaves behind: a row for each shape in a CSV file, and a table to read."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from slo import Measured


@dataclass(frozen=True)
class Run:
    """Where the numbers come from. `model`, `revision` and `numerics` are the server's own words."""

    date: str
    commit: str
    hardware: str
    profile: str
    users: int
    seconds: float
    model: str
    revision: str
    numerics: str


def hardware() -> str:
    """The machine that made the load (for a local run, also the server's), in words."""
    return f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores"


def rows(run: Run, measured: Sequence[Measured]) -> list[dict[str, str]]:
    """One flat row for each shape that was used."""
    return [_row(run, m) for m in measured if m.requests]


def append_csv(path: Path, new: Sequence[Mapping[str, str]]) -> None:
    """Append the rows; a new file starts with the header. Raises ValueError if the file has other columns."""
    if not new:
        return
    columns = list(new[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        header = next(csv.reader(file), None)
        if header not in (None, columns):
            raise ValueError(f"{path} has other columns; move it away or name another file")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if header is None:
            writer.writeheader()
        writer.writerows(new)


def markdown(run: Run, measured: Sequence[Measured], missed: Sequence[str]) -> str:
    """The run as a short Markdown page."""
    lines = [
        f"## Load test {run.profile}, {run.date}",
        "",
        f"{run.model}@{run.revision} ({run.numerics}), {run.users} users, {run.seconds:.0f} s, {run.hardware}, "
        f"commit {run.commit}",
        "",
        "| shape | requests | failed | wrong | items/s | p20 ms | p50 ms | p80 ms | p99 ms |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_table_line(run, m) for m in measured if m.requests),
        "",
        *(f"- missed: {line}" for line in missed),
    ]
    if not missed:
        lines.append("All objectives met.")
    return "\n".join(lines) + "\n"


def _table_line(run: Run, m: Measured) -> str:
    times = " | ".join(f"{value:.0f}" for value in (m.p20_ms, m.p50_ms, m.p80_ms, m.p99_ms))
    return f"| {m.shape} | {m.requests} | {m.failures} | {m.wrong} | {_rate(run, m):.1f} | {times} |"


def _row(run: Run, m: Measured) -> dict[str, str]:
    values = {**asdict(run), **asdict(m), "items_per_second": round(_rate(run, m), 2)}
    values["seconds"] = round(run.seconds, 1)
    return {name: str(value) for name, value in values.items()}


def _rate(run: Run, m: Measured) -> float:
    return m.items / run.seconds if run.seconds > 0 else 0.0
