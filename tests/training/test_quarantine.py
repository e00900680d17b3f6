"""The list of bad rows: complete, the same on every run, and never in the way of another file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from plaudit_training.errors import BadRows, DataError, OptionError
from plaudit_training.sources import ReadOptions, read

GOOD = b'{"prompt": "p", "chosen": "x", "rejected": "y"}\n'
SECRET = b'{"prompt": "a secret", "chosen": 1, "rejected": "y"}\r\n'


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + SECRET + b"\xff\n")
    return path


def run(data: Path, quarantine: Path, *, text: bool = False, tolerate: int = 0) -> None:
    options = ReadOptions(quarantine=quarantine, quarantine_text=text, max_bad_rows=tolerate)
    list(read([str(data)], options))


def test_an_entry_has_place_reason_and_hash_and_no_text(data: Path, tmp_path: Path) -> None:
    quarantine = tmp_path / "q.jsonl"
    with pytest.raises(BadRows, match=r"all are listed in .*q\.jsonl; at most 0 may be"):
        run(data, quarantine)
    first, second = map(json.loads, quarantine.read_text().splitlines())
    assert first == {
        "file": str(data), "line": 2, "offset": len(GOOD), "reason": "wrong_type",
        "detail": "chosen should be text, is int", "sha256": hashlib.sha256(SECRET).hexdigest(),
    }  # fmt: skip
    assert (second["line"], second["reason"], second["offset"]) == (3, "bad_utf8", len(GOOD + SECRET))
    assert "secret" not in quarantine.read_text()


def test_text_only_when_asked_for(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "q.jsonl", text=True, tolerate=2)
    entries = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [entry["text"] for entry in entries] == [SECRET.decode().strip(), "\\xff"]


def test_a_second_run_writes_the_same_bytes(data: Path, tmp_path: Path) -> None:
    quarantine = tmp_path / "q.jsonl"
    run(data, quarantine, tolerate=2)
    before = quarantine.read_bytes()
    run(data, quarantine, tolerate=2)
    assert quarantine.read_bytes() == before and len(before.splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "q.jsonl"]


def test_a_clean_run_leaves_no_list(data: Path, tmp_path: Path) -> None:
    quarantine = tmp_path / "q.jsonl"
    run(data, quarantine, tolerate=2)
    data.write_bytes(GOOD)
    run(data, quarantine)
    assert not quarantine.exists()


@pytest.mark.parametrize("held", [b"", b"my notes\n", b'{"prompt": "p"}\n', b"[1]\n"])
def test_another_file_is_not_overwritten(data: Path, tmp_path: Path, held: bytes) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(held)
    with pytest.raises(OptionError, match="is no list of bad rows"):
        run(data, other)
    assert other.read_bytes() == held


def test_the_data_itself_is_not_overwritten(tmp_path: Path, data: Path) -> None:
    quarantine = tmp_path / "q.jsonl"
    run(data, quarantine, tolerate=2)
    with pytest.raises(OptionError, match="name another file"):
        run(quarantine, quarantine)


def test_reading_that_ends_early_leaves_no_half_list(data: Path, tmp_path: Path) -> None:
    data.write_bytes(b"\xff\n" + GOOD * 2)
    stream = read([str(data)], ReadOptions(quarantine=tmp_path / "q.jsonl"))
    next(stream)
    assert (tmp_path / "q.jsonl.partial").exists()
    stream.close()  # type: ignore[attr-defined]  # it is a generator
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_a_list_that_cannot_be_written_stops_the_run(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        run(data, tmp_path / "file" / "q.jsonl", tolerate=2)
