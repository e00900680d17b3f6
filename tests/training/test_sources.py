"""Real files and every container: what is read, from where, and that nothing is lost."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit_model.records import Votes
from plaudit_training import csv_rows, frames, json_rows
from plaudit_training.errors import BadRows, DataError, OptionError
from plaudit_training.sources import ReadOptions, ReadReport, load, read, read_options

ROWS = [{"prompt": f"question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(3)]
LINES = [json.dumps(row) for row in ROWS]


def texts(paths: list[str], options: ReadOptions | None = None) -> list[tuple[str, str, str, int]]:
    return [(r.prompt[0].content, *r.responses, r.origin.line) for r in read(paths, options or ReadOptions())]


def expected(lines: list[int]) -> list[tuple[str, str, str, int]]:
    return [(row["prompt"], row["chosen"], row["rejected"], line) for row, line in zip(ROWS, lines, strict=True)]


# -- real data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("subset", "rows", "one_empty"), [("harmless-base", 1181, 1), ("helpful-base", 1160, 2)])
def test_every_row_of_the_real_transcripts_is_used(shared_data: Path, subset: str, rows: int, one_empty: int) -> None:
    records, report = load([str(shared_data / "hh_rlhf" / subset / "half_a.jsonl.gz")], ReadOptions())
    assert (report.read, report.used, len(records)) == (rows, rows, rows)
    assert report.files[0].format == "hh-rlhf" and report.files[0].detected
    assert report.noted.counts == {"one_empty_response": one_empty}
    assert all(r.prompt[0].role == "user" and r.prompt[-1].role == "user" for r in records)


def test_identical_pairs_of_real_data_are_dropped_and_do_not_stop_the_run(shared_data: Path) -> None:
    path = str(shared_data / "hh_rlhf" / "helpful-rejection-sampled" / "train.jsonl.gz")
    records, report = load([path], ReadOptions())
    assert report.dropped.counts == {"identical_pair": 5} and len(records) == 95
    assert [origin.line for origin in report.dropped.first["identical_pair"]] == [89, 90, 95]


@pytest.mark.parametrize(
    ("part", "rows", "identical", "ties", "unlabelled"), [("train", 11076, 10, 2202, 517), ("dev", 2380, 2, 631, 160)]
)
def test_real_votes(shared_data: Path, part: str, rows: int, identical: int, ties: int, unlabelled: int) -> None:
    path = str(shared_data / "ukpconvarg1" / f"{part}.jsonl.gz")
    records, report = load([path], ReadOptions(ties="keep"))
    assert (report.read, report.used, report.ties) == (rows, rows - identical, ties)
    assert report.dropped.counts == {"identical_pair": identical}
    assert report.noted.counts["gold_missing"] == unlabelled
    comparisons = [record.comparisons[0] for record in records]
    assert report.voted == len(records) and {c.votes.total for c in comparisons if c.votes} == {4, 5}
    assert all(len(c.annotators) == c.votes.total for c in comparisons if c.votes)


@pytest.mark.parametrize(("part", "ids"), [("train", 7848), ("dev", 1419)])
def test_strict_ids_of_real_data(shared_data: Path, part: str, ids: int) -> None:
    folder = shared_data / "ukpconvarg1"
    options = ReadOptions(strict_ids=folder / f"{part}.strict_ids.txt.gz")
    records, report = load([str(folder / f"{part}.jsonl.gz")], options)
    assert len(records) == report.used == ids and report.ties == report.strict_ids_missing == 0
    assert report.dropped.counts["not_in_strict_ids"] == report.read - ids


def test_a_real_pair_as_a_record(shared_data: Path) -> None:
    first = next(read([str(shared_data / "ukpconvarg1" / "dev.jsonl.gz")], ReadOptions()))
    assert first.id == "arg33259_arg33328"
    assert first.prompt[0].content.endswith("would you turn them in?\nNo")
    assert first.comparisons[0].outcome == "second" and first.comparisons[0].votes == Votes(1, 4, 0)
    assert first.comparisons[0].annotators == ("W3361", "W1258", "W3067", "W2582", "W3182")


# -- containers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_json_lines(tmp_path: Path, end: str, last: bool, bom: bytes, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    data = bom + (end.join(LINES) + (end if last else "")).encode()
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert texts([str(path)]) == expected([1, 2, 3])


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_a_json_array(tmp_path: Path, indent: int | None, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    data = b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=indent).encode() + b"\n"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert texts([str(path)]) == expected([1, 2, 3])


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".csv.gz", ","), (".tsv", "\t")])
def test_tables(tmp_path: Path, suffix: str, delimiter: str) -> None:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["prompt", "chosen", "rejected"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    data = b"\xef\xbb\xbf" + out.getvalue().encode()
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert texts([str(path)]) == expected([2, 3, 4])


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n" + "\n \n".join(LINES) + "\n\n")
    report = ReadReport()
    assert [r.origin.line for r in read([str(path)], ReadOptions(), report)] == [2, 4, 6] and report.read == 3


def test_a_quoted_cell_may_hold_lines_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,chosen,rejected\n"a\nb ""c""",x,y\nnext,u,v\n')
    assert texts([str(path)]) == [('a\nb "c"', "x", "y", 2), ("next", "u", "v", 4)]


def test_the_word_starter_is_the_built_in_generator() -> None:
    records, report = load(["starter"], ReadOptions(starter_records=20, seed=3))
    assert len(records) == report.used == 20 and report.files[0].format == "starter"
    assert records == load(["starter"], ReadOptions(starter_records=20, seed=3))[0]


def test_files_of_different_formats_are_read_together(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.csv"
    one.write_text("\n".join(LINES))
    two.write_text("prompt,response_a,response_b,label\np,x,y,B\n")
    records, report = load([str(one), str(two)], ReadOptions())
    assert [file.format for file in report.files] == ["preference", "pairs"]
    assert records[-1].id == f"{two}:2" and records[-1].comparisons[0].outcome == "second"


rows_of_text = st.lists(
    st.dictionaries(st.text(max_size=4), st.text(max_size=12) | st.lists(st.text(max_size=3))), max_size=6
)


@settings(max_examples=150)
@given(rows=rows_of_text, piece=st.integers(1, 9), indent=st.sampled_from([None, 1]))
def test_an_array_is_cut_where_its_elements_end(rows: list[Any], piece: int, indent: int | None) -> None:
    data = json.dumps(rows, ensure_ascii=False, indent=indent).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "PIECE", piece)
        stream = io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]  # BytesIO is raw enough
        found = list(json_rows.file_rows(stream, 1 << 20))
    assert [row.content for row in found] == rows
    assert [row.frame.line for row in found] == list(range(1, len(rows) + 1))
    assert all(data[row.frame.offset :].startswith(row.frame.raw) for row in found)


cell = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@settings(max_examples=150)
@given(cells=st.lists(st.tuples(cell, cell), max_size=6))
def test_tables_keep_their_cells_and_places(cells: list[tuple[str, str]]) -> None:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([("a", "b"), *cells])
    data = out.getvalue().encode()
    stream = io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]
    found = list(csv_rows.cell_rows(stream, 1 << 20, ","))
    assert [row.content for row in found] == [{"a": a, "b": b} for a, b in cells]
    for row in found:
        assert data[row.frame.offset :].startswith(row.frame.raw)
        assert data[: row.frame.offset].count(b"\n") == row.frame.line - 1


# -- files that cannot be read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("data.parquet", b"PAR1", "only files named"),
        ("data.jsonl.gz", gzip.compress(LINES[0].encode() * 9, mtime=0)[:-9], "damaged"),
        ("data.jsonl.gz", LINES[0].encode(), "cannot be read: Not a gzipped file"),
        ("data.json", b'"text"', "must hold an array"),
        ("data.csv", b"prompt,prompt\na,b\n", "names a column twice"),
        ("data.csv", b"\xff,b\n", "header cannot be read: bad_utf8"),
        ("data.jsonl", b'{"question": "?", "answer": "!"}\n', "no known format has the columns question, answer"),
        ("data.jsonl", b"", "no row can be used"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        load([str(path)], ReadOptions())


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: the file cannot be read: No such file"):
        load([str(tmp_path / "none.jsonl")], ReadOptions())


def test_rows_that_could_be_two_formats_are_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    turns = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    path.write_text(json.dumps({"prompt": "a", **turns}))
    with pytest.raises(DataError, match="could be hh-rlhf or preference; say which with --format"):
        load([str(path)], ReadOptions())
    assert load([str(path)], ReadOptions(format="hh-rlhf"))[0][0].responses == ("b", "c")


# -- options --------------------------------------------------------------------------------------------------


def test_columns_are_renamed_and_the_rest_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"question": "q", "good": "g", "bad": "b", "prompt": "not this", "note": 1}))
    options = read_options(columns="prompt=question, chosen=good,rejected=bad")
    records, report = load([str(path)], options)
    assert records[0].prompt[0].content == "q" and records[0].responses == ("g", "b")
    assert report.files[0].format == "preference" and not report.files[0].detected
    assert list(report.files[0].columns_not_read) == ["note"]
    assert report.sentences() == [f"columns not read: note ({path})"], "a run says so, too"


def test_columns_that_are_not_read_are_named_in_their_order(tmp_path: Path) -> None:
    others = [f"column {number}" for number in range(9)]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROWS[0] | dict.fromkeys(others, 1)))
    _, report = load([str(path)], ReadOptions())
    assert list(report.files[0].columns_not_read) == others


def test_a_mapped_column_that_the_format_does_not_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "p", "a": "x", "b": "y", "winner": "B"}))
    options = read_options(columns="chosen=a,rejected=b,label=winner")  # else the first would win in every row
    with pytest.raises(DataError, match="--columns names label, which the format preference does not read"):
        load([str(path)], options)


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_a_spreadsheet_of_a_country_with_a_decimal_comma(tmp_path: Path, suffix: str) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=";", lineterminator="\r\n")
    writer.writerows([["prompt", "chosen", "rejected"], ["a;b, c?", "yes, it is", "no"]])
    data = b"\xef\xbb\xbf" + stream.getvalue().encode()
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert texts([str(path)]) == [("a;b, c?", "yes, it is", "no", 2)]


def test_a_header_with_commas_is_read_with_commas(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,chosen,rejected,a;b\nq,g;h,r,1\n")
    assert texts([str(path)]) == [("q", "g;h", "r", 2)]


def test_a_mapped_column_that_no_row_has(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(LINES))
    with pytest.raises(DataError, match="no row has the column 'query'.*there are prompt, chosen, rejected"):
        load([str(path)], ReadOptions(columns={"prompt": "query"}))


@pytest.mark.parametrize(
    ("given_options", "message"),
    [
        ({"format": "parquet"}, "expected one of auto, hh-rlhf"),
        ({"columns": "question=prompt"}, "columns: expected one of"),
        ({"columns": "prompt"}, "is written name=name"),
        ({"columns": "prompt=a,prompt=b"}, "each name once"),
        ({"labels": "1=first"}, "must be mapped to a, b or tie"),
        ({"ties": "ignore"}, "expected one of drop, half, keep"),
        ({"max_bad_rows": -1}, "must not be negative"),
    ],
)
def test_options_that_do_not_exist(given_options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_options(**given_options)


def test_strict_ids_that_fit_no_row(tmp_path: Path) -> None:
    data, ids = tmp_path / "data.jsonl", tmp_path / "ids.txt"
    data.write_text("\n".join(LINES))
    ids.write_text("other\n")
    with pytest.raises(DataError, match="no row can be used.*not_in_strict_ids.*1 of the strict ids are in none"):
        load([str(data)], ReadOptions(strict_ids=ids))
    ids.write_text("\n")
    with pytest.raises(DataError, match="lists no id"):
        load([str(data)], ReadOptions(strict_ids=ids))


def test_bad_rows_are_tolerated_up_to_a_number_and_reported_after_the_last_record(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([LINES[0], "{", LINES[1], "[]", LINES[2]]))
    assert texts([str(path)], ReadOptions(max_bad_rows=2)) == expected([1, 3, 5])
    records = []
    with pytest.raises(BadRows, match=r"2 of 5 rows are bad: bad_json 1 \(.*data\.jsonl:2\); wrong_type 1 \(.*:4\)"):
        for record in read([str(path)], ReadOptions(max_bad_rows=1)):
            records.append(record)
    assert len(records) == 3 and BadRows.exit_code == 65


def test_a_row_is_never_held_as_more_than_the_limit() -> None:
    builder = frames.FrameBuilder(1, 0, 4)
    for piece in (b"abc", b"de", b"f"):
        builder.add(piece)
    frame = builder.frame()
    assert frame.raw == b"" and frame.defect and frame.defect.reason == "too_large"
    assert frame.sha256 == frames.Frame(1, 0, b"abcdef").sha256
