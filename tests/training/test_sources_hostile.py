"""Rows that nobody wants to meet: each is found, counted under its reason, at its line."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit_training.errors import BadRows
from plaudit_training.json_rows import MAX_DEPTH
from plaudit_training.sources import ReadOptions, ReadReport, read

GOOD = {"prompt": "Which?", "chosen": "this", "rejected": "that"}


def row(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def without(key: str) -> bytes:
    return json.dumps({k: v for k, v in GOOD.items() if k != key}).encode()


HOSTILE: list[tuple[str, bytes]] = [
    ("bad_utf8", row().replace(b"this", b"th\xffs")),
    ("bad_utf8", row().replace(b"this", b"\xed\xa0\x80")),
    ("bad_json", b'{"prompt": "cut off'),
    ("bad_json", b'\xef\xbb\xbf{"prompt": "a mark inside"}'),
    ("bad_json", b'{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}'),
    ("bad_json", row(margin=1).replace(b"1}", b"9" * 5000 + b"}")),
    ("too_deep", b"[" * 100_000),
    ("too_deep", row(extra=0).replace(b"0}", b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1) + b"}")),
    ("too_large", row(chosen="x" * 5000)),
    ("missing_key", without("chosen")),
    ("missing_key", row(rejected=None)),
    ("wrong_type", row(chosen=True)),
    ("wrong_type", b'["a", "list"]'),
    ("wrong_type", row(prompt=3)),
    ("wrong_type", row(chosen=[{"role": "robot", "content": "x"}], rejected=[{"role": "robot", "content": "y"}])),
    ("empty_prompt", row(prompt=" \n")),
    ("empty_response", row(chosen="", rejected=" ")),
    ("lone_surrogate", row(chosen="\ud83d")),
    ("bad_margin", row(margin=float("nan"))),
    ("bad_margin", row(margin=float("inf"))),
    ("bad_margin", row(margin="much")),
    ("bad_margin", row(margin=True)),
    ("bad_margin", row(margin=10).replace(b"10}", b"1" + b"0" * 400 + b"}")),
    ("bad_transcript", row(chosen=[{"role": "user", "content": "?"}], rejected=[{"role": "user", "content": "!"}])),
    ("unsupported", row(tools=[{"name": "search"}])),
]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_every_hostile_row_has_its_reason_and_line(tmp_path: Path, end: bytes) -> None:
    path, quarantine = tmp_path / "data.jsonl", tmp_path / "out" / "quarantine.jsonl"
    lines: list[bytes] = []
    for number, (_, bad) in enumerate(HOSTILE):
        lines += [row(prompt=f"{number}?"), bad]
    data = end.join(lines)
    path.write_bytes(data)
    options = ReadOptions(max_row_bytes=4096, max_bad_rows=len(HOSTILE), quarantine=quarantine)
    # The bombs of 100,000 and 5,000 bytes are larger than a row may be here; they have a test of their own.
    small = [(reason if len(bad) + len(end) <= 4096 else "too_large") for reason, bad in HOSTILE]
    report = ReadReport()
    records = list(read([str(path)], options, report))
    assert [record.origin.line for record in records] == list(range(1, 2 * len(HOSTILE), 2))
    listed = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(entry["reason"], entry["line"]) for entry in listed] == [
        (reason, 2 * number + 2) for number, reason in enumerate(small)
    ]
    assert all(data[entry["offset"] :].startswith(bad) for entry, (_, bad) in zip(listed, HOSTILE, strict=True))
    assert report.quarantined.counts == Counter(small)
    assert report.read == report.used + report.quarantined.total == 2 * len(HOSTILE)


@pytest.mark.parametrize(("reason", "bad"), [case for case in HOSTILE if len(case[1]) > 4096])
def test_bombs_within_the_size_of_a_row(tmp_path: Path, reason: str, bad: bytes) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(row() + b"\n" + bad + b"\n")
    report = ReadReport()
    with pytest.raises(BadRows):
        list(read([str(path)], ReadOptions(max_row_bytes=len(bad) + (reason != "too_large")), report))
    assert report.quarantined.counts == {reason: 1} and report.used == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_row_of_64_mb_is_rejected_without_being_held(tmp_path: Path, suffix: str) -> None:
    head, tail = {
        ".jsonl": (row() + b'\n{"chosen": "', b'"}\n' + row(prompt="after") + b"\n"),
        ".json": (b"[" + row() + b', {"chosen": "', b'"}, ' + row(prompt="after") + b"]"),
        ".csv": (b'prompt,chosen,rejected\nWhich?,this,that\n"', b'",a,b\nafter,c,d\n'),
    }[suffix]
    path = tmp_path / f"data{suffix}"
    with path.open("wb") as stream:
        stream.write(head)
        for _ in range(64):
            stream.write(b"x" * (1 << 20))
        stream.write(tail)
    report = ReadReport()
    tracemalloc.start()
    records = list(read([str(path)], ReadOptions(max_bad_rows=1), report))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.quarantined.counts == {"too_large": 1}
    assert [record.prompt[0].content for record in records] == ["Which?", "after"]
    assert report.quarantined.first["too_large"][0].line == (3 if suffix == ".csv" else 2)
    assert peak < 3 * (8 << 20)


def test_texts_with_many_brackets_are_not_deep(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(row(chosen='if (a[0]) {"' * 500 + "\\") + b"\n")
    assert len(list(read([str(path)], ReadOptions()))) == 1


def test_nan_in_a_column_that_is_not_read_is_nobodys_business(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(row(score=float("nan")) + b"\n")
    assert len(list(read([str(path)], ReadOptions()))) == 1


@pytest.mark.parametrize(
    ("data", "reasons"),
    [
        (b"a,b\n", {"bad_csv": 1}),
        (b"a,b,c,d\n", {"bad_csv": 1}),
        (b'"a,b,c\n', {"bad_csv": 1}),
        (b'"a"x,b,c\ngood?,c,d\n', {"bad_csv": 1}),
        (b'"line\nwith \xff\n",b,c\ngood?,c,d\n', {"bad_utf8": 1}),
        (b",b,c\n", {"empty_prompt": 1}),
        (b"p,,\n", {"empty_response": 1}),
    ],
)
def test_bad_rows_of_tables(tmp_path: Path, data: bytes, reasons: dict[str, int]) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"prompt,chosen,rejected\nfirst?,c,d\n" + data)
    report = ReadReport()
    list(read([str(path)], ReadOptions(max_bad_rows=1), report))
    assert report.quarantined.counts == reasons
    assert report.quarantined.first[next(iter(reasons))][0].line == 3
    assert report.used == 1 + data.count(b"good?")


@pytest.mark.parametrize(
    ("data", "used", "bad_line"),
    [
        (b"[%s, {, %s]", 1, 2),
        (b"[%s, %s", 1, 2),
        (b"[%s, %s,", 2, 3),
        (b"[%s, %s] trailing", 2, 3),
        (b"[%s,, %s]", 2, 2),
    ],
)
def test_bad_arrays(tmp_path: Path, data: bytes, used: int, bad_line: int) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(data % (row(prompt="1"), row(prompt="2")))
    report = ReadReport()
    list(read([str(path)], ReadOptions(max_bad_rows=1), report))
    assert report.quarantined.counts == {"bad_json": 1} and report.used == used
    assert report.quarantined.first["bad_json"][0].line == bad_line


kinds = st.sampled_from(["used", "duplicate", "identical_pair", "blank", *{reason for reason, _ in HOSTILE}])


@settings(max_examples=60)
@given(plan=st.lists(kinds, max_size=40), last=st.booleans(), bom=st.booleans())
def test_every_row_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory, plan: list[str], last: bool, bom: bool
) -> None:
    hostile = {reason: bad for reason, bad in HOSTILE if len(bad) < 4096 or reason == "too_large"}
    lines, ledger, used = [], Counter[str](), 0
    for kind in plan:
        if kind == "duplicate" and not used:
            kind = "used"
        used += kind == "used"
        lines.append({
            "used": row(prompt=f"{used}?"), "duplicate": row(prompt=f"{used}?"), "blank": b" ",
            "identical_pair": row(chosen="same", rejected="same"),
        }.get(kind) or hostile[kind])  # fmt: skip
        ledger[kind] += kind != "blank"
    path = tmp_path_factory.mktemp("ledger") / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * bom + b"\n".join(lines) + b"\n" * last)
    report = ReadReport()
    options = ReadOptions(max_bad_rows=len(plan), max_row_bytes=4096, format="preference")
    assert len(list(read([str(path)], options, report))) == report.used == used
    assert report.read == report.used + report.quarantined.total + report.dropped.total == ledger.total()
    assert report.duplicates == ledger["duplicate"]
    assert {**report.quarantined.counts, **report.dropped.counts} == {
        kind: count for kind, count in ledger.items() if kind != "used" and count
    }
