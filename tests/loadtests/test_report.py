"""The report: complete rows with provenance, appended and never mixed."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from report import Run, append_csv, hardware, markdown, rows
from slo import Measured

RUN = Run(
    date="2024-05-17T12:00:00+00:00", commit="abc1234", hardware="a machine", profile="cpu", users=12, seconds=10.04,
    model="m", revision="r", numerics="n",
)  # fmt: skip
STORM = Measured("storm", requests=50, failures=1, wrong=0, items=49, p20_ms=5, p50_ms=8, p80_ms=12, p99_ms=40)
UNUSED = Measured("batch", requests=0, failures=0, wrong=0, items=0, p20_ms=0, p50_ms=0, p80_ms=0, p99_ms=0)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_holds_provenance_and_percentiles() -> None:
    (row,) = rows(RUN, [STORM, UNUSED])
    assert {"date", "commit", "hardware", "p20_ms", "p50_ms", "p80_ms", "numerics"} <= set(row)
    assert (row["shape"], row["items_per_second"], row["seconds"]) == ("storm", "4.88", "10.0")


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "results" / "cpu.csv"
    append_csv(path, rows(RUN, [STORM]))
    append_csv(path, rows(RUN, [STORM, UNUSED]))
    append_csv(path, [])
    assert [row["p99_ms"] for row in read(path)] == ["40", "40"]
    assert path.read_text().count("date,") == 1


def test_a_file_with_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        append_csv(path, rows(RUN, [STORM]))
    assert path.read_text() == "a,b\n1,2\n"


def test_the_page_says_what_was_missed() -> None:
    page = markdown(RUN, [STORM, UNUSED], ["storm: p99 40 ms above 30 ms"])
    assert "| storm | 50 | 1 | 0 | 4.9 | 5 | 8 | 12 | 40 |" in page
    assert "- missed: storm: p99 40 ms above 30 ms" in page
    assert "All objectives met" not in page and "batch" not in page
    assert "All objectives met." in markdown(RUN, [STORM], [])


def test_the_machine_is_described() -> None:
    assert "cores" in hardware()
