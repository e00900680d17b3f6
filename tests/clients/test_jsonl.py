from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from plaudit._jsonl import Row, open_input, open_output, read_rows, result_line
from plaudit.errors import InvalidInput, OutputFailed
from plaudit.types import Identity, ItemError, ScoreResult, Truncation

IDENTITY = Identity("m", "r", "n")


def rows(*values: Any, prefix: str = "") -> list[Row]:
    lines = [value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n" for value in values]
    return list(read_rows(lines, prefix))


def test_a_row_keeps_its_other_fields_and_sends_only_its_item() -> None:
    (row,) = rows({"id": 7, "prompt": "p", "response": "r", "chosen_by": ["a"]})
    assert row.item == {"prompt": "p", "response": "r"} and row.responses == 1 and row.line == 1
    line = json.loads(result_line(row, [ScoreResult(0.5, tokens=4)], IDENTITY, overlong="error"))
    assert list(line) == ["id", "prompt", "response", "chosen_by", "score", "plaudit"] and line["score"] == 0.5
    assert line["plaudit"] == {"row_sha256": row.sha256, "model": "m", "revision": "r", "numerics": "n",
                               "overlong": "error", "tokens": 4}  # fmt: skip


def test_a_row_with_responses_gets_a_list() -> None:
    (row,) = rows({"prompt": "p", "responses": ["a", "b"]})
    assert row.responses == 2
    failed = ScoreResult(None, error=ItemError("too_long", "cut it"))
    cut = ScoreResult(1.0, tokens=3, truncated=Truncation("prompt", 2))
    line = json.loads(result_line(row, [cut, failed], IDENTITY, overlong="error"))
    assert line["scores"] == [1.0, None] and line["errors"] == [None, {"code": "too_long", "message": "cut it"}]
    assert line["plaudit"]["truncated"] == [{"side": "prompt", "tokens": 2}, None] and "score" not in line
    (empty,) = rows({"prompt": "p", "responses": []})
    assert json.loads(result_line(empty, [], None, overlong="error"))["scores"] == []


def test_blank_lines_are_skipped_but_counted() -> None:
    found = rows(b"\n", {"text": "a"}, b"  \r\n", {"text": "b"})
    assert [row.line for row in found] == [2, 4]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "p", "response": ', "not JSON"),
        (b'{"text": "a", "weight": NaN}', "NaN is no number"),
        (b"[1]", "not a JSON object, but list"),
        (b"[" * 100_000, "not JSON"),
        (b'"\xff"', "not JSON"),
        (b'{"question": "p"}', "an item is one of"),
        (b"{}", "an item is one of"),
        (b'{"prompt": "p", "response": null}', "'response' must be a text, got null"),
        (b'{"prompt": "p", "response": "r", "messages": []}', "an item is one of"),
        (b'{"text": "a", "weight": 1e999}', "is not JSON"),
    ],
)
def test_a_bad_row_says_why_and_keeps_its_place(line: bytes, reason: str) -> None:
    good, bad, after = rows({"text": "a"}, line + b"\n", {"text": "b"})
    assert bad.problem is not None and bad.problem.code == "bad_row" and reason in bad.problem.message
    assert json.loads(result_line(bad, [], None, overlong="error"))["error"] == {
        "code": "bad_row",
        "message": bad.problem.message,
    }
    assert bad.item is None and bad.responses == 0 and (good.item, after.item) == ({"text": "a"}, {"text": "b"})


def test_the_line_of_a_bad_row_has_its_error_and_no_score() -> None:
    (row,) = rows({"id": 3, "prompt": "p"})
    line = json.loads(result_line(row, [], IDENTITY, overlong="error"))
    assert line["id"] == 3 and line["score"] is None and line["error"]["code"] == "bad_row"
    assert line["plaudit"] == {"row_sha256": row.sha256}


def test_a_field_is_never_overwritten() -> None:
    with pytest.raises(InvalidInput, match="line 1 has a field 'score' of its own; name ours with --prefix"):
        rows({"text": "a", "score": 4})
    (row,) = rows({"text": "a", "score": 4}, prefix="rm_")
    line = json.loads(result_line(row, [ScoreResult(0.5)], IDENTITY, overlong="error", prefix="rm_"))
    assert (line["score"], line["rm_score"], line["rm_plaudit"]["model"]) == (4, 0.5, "m")


def test_the_hash_is_of_the_content_not_of_the_line_end() -> None:
    one, two, three = rows(b'{"text":"a"}\n', b'{"text":"a"}\r\n', b'{"text":"b"}')
    assert one.sha256 == two.sha256 != three.sha256


def test_a_lone_surrogate_survives() -> None:
    (row,) = rows(b'{"text": "a\\ud800"}\n')
    assert json.loads(result_line(row, [ScoreResult(0.5)], IDENTITY, overlong="error"))["text"] == "a\ud800"


def test_plain_and_zipped_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    for name in ("a.jsonl", "a.jsonl.gz"):
        with open_input(str(tmp_path / name)) as lines:
            assert [row.item for row in read_rows(lines)] == [{"text": "a"}]
    with pytest.raises(InvalidInput, match="cannot be read: No such file"):
        open_input(str(tmp_path / "none.jsonl"))
    with pytest.raises(InvalidInput, match="cannot be written: Is a directory"):
        open_output(str(tmp_path)).__enter__()


WHOLE = gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)


@pytest.mark.parametrize(
    "damaged",
    [
        gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-12],
        b"no gzip",
        gzip.compress(b"a" * 99, mtime=0)[:10] + b"\xff" * 9,
    ],
)
def test_a_damaged_file_is_bad_input(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(damaged)
    with open_input(str(tmp_path / "a.jsonl.gz")) as lines, pytest.raises(InvalidInput, match="cannot be read to its"):
        list(read_rows(lines))


def test_a_full_disk_is_an_error_of_its_own() -> None:
    with (
        pytest.raises(OutputFailed, match="/dev/full cannot be written any further: No space"),
        open_output("/dev/full") as write,
    ):
        write(b"line\n")
