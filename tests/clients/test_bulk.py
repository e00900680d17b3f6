from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaudit._bulk import BATCH_BYTES, Tally, batches, in_order, score_batches, take_up
from plaudit._jsonl import Row, read_rows
from plaudit._settings import Overlong
from plaudit.errors import ConfigurationError, InvalidInput, RevisionChanged
from plaudit.types import Identity, ItemError, ScoreResult, Scores

ONE, TWO = Identity("m", "r1", "n"), Identity("m", "r2", "n")


class Scorer:
    """Scores a text by its length; `bad` has no score."""

    def __init__(self, identity: Identity = ONE, ahead: int = 3) -> None:
        self.identity, self.ahead = identity, ahead
        self.calls: list[int] = []

    def score_items(self, items: Sequence[Any]) -> Scores:
        self.calls.append(len(items))
        texts = [text for item in items for text in item.get("responses", [item.get("text")])]
        bad = ItemError("too_long", "cut it")
        results = (ScoreResult(None, error=bad) if text == "bad" else ScoreResult(float(len(text))) for text in texts)
        return Scores(tuple(results), self.identity)


def lines(count: int) -> list[bytes]:
    return [json.dumps({"text": "x" * n}).encode() + b"\n" for n in range(count)]


def write(out: Path, source: list[bytes], scorer: Any, *, overlong: Overlong = "error") -> Tally:
    """One run of `plaudit score`, without the command line."""
    rows = read_rows(source)
    tally, rows = take_up(out, rows, overlong=overlong) if out.exists() else (Tally(), rows)
    with out.open("ab") as sink:
        for done in score_batches(batches(rows, 4), scorer, tally, overlong=overlong):
            sink.write(done.line)
    return tally


def test_rows_come_out_in_order_scored_and_counted(tmp_path: Path) -> None:
    source = [*lines(9), b"oops\n", b'{"prompt": "p", "responses": ["abc", "bad"]}\n', b'{"text": "bad"}\n', *lines(2)]
    scorer = Scorer()
    tally = write(tmp_path / "out", source, scorer)
    found = [json.loads(line) for line in (tmp_path / "out").read_bytes().splitlines()]
    scores = [row.get("score", row.get("scores")) for row in found]
    assert scores == [*map(float, range(9)), None, [3.0, None], None, 0.0, 1.0]
    assert tally == Tally(rows=14, failed=3, earlier=0, identity=ONE)
    assert sum(scorer.calls) == 13 and max(scorer.calls) <= 4


@given(cut=st.integers(0, 900))
def test_a_run_that_stopped_anywhere_is_taken_up_there(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    directory = tmp_path_factory.mktemp("run")
    whole, resumed = directory / "whole", directory / "resumed"
    write(whole, lines(6), Scorer())
    resumed.write_bytes(whole.read_bytes()[:cut])
    scorer = Scorer()
    tally = write(resumed, lines(6), scorer)
    assert resumed.read_bytes() == whole.read_bytes()
    assert tally.earlier == whole.read_bytes()[:cut].count(b"\n") == 6 - sum(scorer.calls) and tally.rows == 6


def test_failed_rows_of_an_earlier_run_count(tmp_path: Path) -> None:
    source = [b'{"text": "bad"}\n', b"oops\n", *lines(1)]
    write(tmp_path / "out", source, Scorer())
    assert write(tmp_path / "out", source, Scorer()) == Tally(rows=3, failed=2, earlier=3, identity=ONE)


@pytest.mark.parametrize("damage", ["another row", "fewer rows", "no result", "no json", "no model"])
def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    write(out, lines(3), Scorer())
    source = lines(3)
    if damage == "another row":
        source[1] = b'{"text": "other"}\n'
    elif damage == "fewer rows":
        del source[2]
    else:
        bad = {"no result": b'{"text": "x"}\n', "no json": b"x\n", "no model": b'{"plaudit": {"revision": "r"}}\n'}
        out.write_bytes(out.read_bytes().splitlines(keepends=True)[0] + bad[damage])
    before = out.read_bytes()
    with pytest.raises(InvalidInput, match=r"out:\d was not made from the row in its place"):
        write(out, source, Scorer())
    assert out.read_bytes() == before


def test_one_file_holds_the_scores_of_one_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, lines(3), Scorer())
    before = out.read_bytes()
    with pytest.raises(RevisionChanged, match=r"scored by m@r1 \(n\), these by m@r2 \(n\)"):
        write(out, lines(6), Scorer(TWO))
    assert out.read_bytes() == before


def test_one_file_holds_scores_of_one_way_to_cut(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, [b"oops\n", *lines(3)], Scorer(), overlong="truncate_left")
    before = out.read_bytes()
    with pytest.raises(ConfigurationError, match="out:2 was scored with --overlong truncate_left"):
        write(out, [b"oops\n", *lines(6)], Scorer())
    assert out.read_bytes() == before


@given(sizes=st.lists(st.integers(0, 9), max_size=30), most=st.integers(1, 8))
def test_batches_keep_every_row_and_the_limit(sizes: list[int], most: int) -> None:
    rows = [_row(n, responses) for n, responses in enumerate(sizes)]
    found = list(batches(rows, most))
    assert [row for batch in found for row in batch] == rows
    for batch in found:
        assert 0 < len(batch) <= most
        assert sum(row.responses for row in batch) <= most or len(batch) == 1


def test_a_batch_ends_at_so_many_bytes() -> None:
    rows = [_row(n, 1, size=BATCH_BYTES // 2) for n in range(5)]
    assert [len(batch) for batch in batches(rows, 100)] == [2, 2, 1]


def _row(line: int, responses: int, size: int = 1) -> Row:
    return Row(line, size, "", {}, {"prompt": "p", "responses": ["r"] * responses})


def test_jobs_overlap_but_results_keep_their_order_and_reading_stays_close() -> None:
    taken: list[int] = []
    meet = threading.Barrier(3)

    def jobs() -> Iterator[int]:
        for n in range(9):
            taken.append(n)
            yield n

    def work(n: int) -> int:
        meet.wait(timeout=20)  # passes only if three of them run at the same time
        return n * n

    results = in_order(jobs(), work, ahead=3)
    assert next(results) == (0, 0) and len(taken) <= 4
    assert list(results) == [(n, n * n) for n in range(1, 9)]


def test_an_error_of_a_job_is_the_callers() -> None:
    def work(n: int) -> float:
        return 1 / n

    results = in_order([1, 0, 2], work, ahead=1)
    assert next(results) == (1, 1.0)
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("precious", [b'{"text": "xx"', b'{"my":"minified json"}', b'{"text":"x', b'{"text":""}'])
def test_a_file_that_is_no_torn_output_is_left_alone(tmp_path: Path, precious: bytes) -> None:
    out = tmp_path / "out"
    out.write_bytes(precious)
    with pytest.raises(InvalidInput, match="choose another --out"):
        take_up(out, read_rows(lines(3)), overlong="error")
    assert out.read_bytes() == precious


def test_a_torn_line_is_cut_wherever_it_was_torn(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write(whole, lines(3), Scorer())
    expected = whole.read_bytes()
    start = expected.index(b"\n") + 1
    for cut in range(start + 1, expected.index(b"\n", start) + 1):
        out = tmp_path / "out"
        out.write_bytes(expected[:cut])
        write(out, lines(3), Scorer())
        assert out.read_bytes() == expected
