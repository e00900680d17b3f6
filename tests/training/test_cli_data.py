"""`plaudit data inspect`: what people and programs see of their data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from plaudit_training.cli_data import app
from plaudit_training.errors import BadRows, DataError, OptionError

RUNNER = CliRunner()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "data.csv"
    path.write_text("question,one,two,verdict,site\n[red] which?,this,that,1,web\nand?,x,y,0,web\nsame?,z,z,2,web\n")
    return path


MAPPED = ["--columns", "prompt=question,response_a=one,response_b=two,label=verdict", "--labels", "1=a,2=b,0=tie"]


def test_inspect_says_what_became_of_every_row(data: Path) -> None:
    result = RUNNER.invoke(app, ["inspect", str(data), *MAPPED], catch_exceptions=False)
    assert result.exit_code == 0
    for said in (
        "format pairs (as named), 3 rows", "columns not read: site", "read 3 = used 2 + quarantined 0 + dropped 1",
        "1 ties, used with the label 0.5", "dropped 1 identical_pair", "2 records of 2 conversations",
        "[red] which?", "0 against 1: response 0 is better",
    ):  # fmt: skip
        assert said in result.output.replace("\n", ""), said
    assert not Path("quarantine.jsonl").exists()


def test_an_id_is_no_markup(data: Path) -> None:
    data.write_text("id,prompt,chosen,rejected\n[/x],which?,this,that\n")
    result = RUNNER.invoke(app, ["inspect", str(data)], catch_exceptions=False)
    assert result.exit_code == 0 and "first record: [/x]" in result.output


def test_json_is_one_object_on_stdout(data: Path) -> None:
    result = RUNNER.invoke(app, ["inspect", str(data), *MAPPED, "--ties", "drop", "--json"], catch_exceptions=False)
    said = json.loads(result.stdout)
    assert (said["read"], said["used"], said["dropped"]["total"]) == (3, 1, 2)
    assert said["dropped"]["reasons"]["tie"] == {"count": 1, "first": [{"file": str(data), "line": 3}]}
    assert said["ties"] == {"policy": "drop", "count": 1} and said["quarantine"] is None
    assert said["files"] == [{
        "file": str(data), "format": "pairs", "detected": False, "rows": 3, "columns_not_read": ["site"],
    }]  # fmt: skip
    assert said["first"]["responses"] == ["this", "that"]
    assert said["summary"]["response_characters"] == {"p50": 4, "p90": 4, "p99": 4, "longest": 4}
    assert said["summary"]["longer_wins"]["share"] is None


def test_bad_rows_are_shown_and_then_fail(data: Path) -> None:
    """Without a label map 0 means nothing."""
    result = RUNNER.invoke(app, ["inspect", str(data), *MAPPED[:2], "--json"])
    assert isinstance(result.exception, BadRows) and "unknown_label 1" in str(result.exception)
    assert "('0'; known are a, b, 1, 2" in str(result.exception), "which label it was"
    said = json.loads(result.stdout)
    assert said["quarantined"]["reasons"]["unknown_label"]["first"] == [{"file": str(data), "line": 3}]
    assert said["quarantine"] == "quarantine.jsonl" and len(Path("quarantine.jsonl").read_text().splitlines()) == 1
    tolerant = RUNNER.invoke(app, ["inspect", str(data), *MAPPED[:2], "--max-bad-rows", "1"])
    assert tolerant.exit_code == 0 and "bad 1 unknown_label" in tolerant.output.replace("\n", "")


@pytest.mark.parametrize("text", ["", "prompt,chosen,rejected\n", "prompt,chosen,rejected\nwhich?,this,this\n"])
def test_nothing_to_use_is_a_failure_as_it_is_of_training(data: Path, text: str) -> None:
    data.write_text(text)
    result = RUNNER.invoke(app, ["inspect", str(data)])
    assert isinstance(result.exception, DataError) and "no row can be used: read " in str(result.exception)
    assert not str(result.exception).endswith("; ") and f"{data}: " in result.output.replace("\n", "")


def test_a_file_without_a_readable_row_has_no_format(data: Path) -> None:
    data.write_bytes("prompt,chosen,rejected\ncafé,a,b\n".encode("latin-1"))
    result = RUNNER.invoke(app, ["inspect", str(data)])
    assert isinstance(result.exception, BadRows)
    assert "data.csv: no row to tell the format by, 1 rows" in result.output.replace("\n", "")


def test_a_wrong_option_is_a_usage_error(data: Path) -> None:
    result = RUNNER.invoke(app, ["inspect", str(data), "--ties", "maybe"])
    assert isinstance(result.exception, OptionError) and OptionError.exit_code == 2


def test_the_starter_can_be_inspected(data: Path) -> None:
    result = RUNNER.invoke(app, ["inspect", "starter", "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["used"] == 2000


def test_importing_the_command_is_light() -> None:
    """`plaudit --help` imports it: no numbers library, no model library."""
    heavy = "{'torch', 'transformers', 'numpy', 'tokenizers', 'plaudit_model'}"
    code = f"import sys, plaudit_training.cli_data; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
