"""Preference files -> records. Every row is used, dropped for a stated reason, or quarantined.

.jsonl .ndjson .json .csv .tsv, each also with .gz; the word `starter` is the built-in generator
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from plaudit_model.records import Origin, Record

from . import csv_rows, formats, json_rows
from .errors import BadRow, BadRows, DataError, Defect, Dropped
from .formats import Columns, Format, Reading, pairs, preference
from .frames import Row, line_frames, opened
from .quarantine import Quarantine
from .read_options import ReadOptions, read_options
from .read_report import FileReport, ReadReport
from .screen import Screen

__all__ = ["STARTER", "ReadOptions", "ReadReport", "load", "read", "read_options"]

LOG = logging.getLogger("plaudit.data")

STARTER = "starter"
_SAMPLE_ROWS, _SAMPLE_BYTES = 20, 16 << 20


def load(paths: Sequence[str], options: ReadOptions) -> tuple[list[Record], ReadReport]:
    """All records of the files, and what became of each row. Raises as `read` does, and DataError if no record
    is left."""
    report = ReadReport()
    records = list(read(paths, options, report))
    if not records:
        raise nothing_used(report)
    return records, report


def nothing_used(report: ReadReport) -> DataError:
    """The error that files are of which no row is left."""
    return DataError("; ".join([f"no row can be used: {report.conservation()}", *report.sentences()]))


def check_files(paths: Sequence[str]) -> None:
    """Raise DataError for a file that cannot be opened or is of no known kind: what a glance can tell."""
    for path in paths:
        if path != STARTER:
            try:
                next(file_rows(Path(path), ReadOptions.max_row_bytes), None)
            except DataError as error:
                raise DataError(f"{path}: {error}") from error


def read(paths: Sequence[str], options: ReadOptions, report: ReadReport | None = None) -> Iterator[Record]:
    """The records of the files, in order, in bounded memory; `report` is filled on the way.

    Raises BadRows after the last record if more than `max_bad_rows` rows were bad; DataError for a file that
    cannot be read or told apart; OptionError for a quarantine path that holds something else.
    """
    reader = _Reader(paths, options, report or ReadReport())
    yield from reader.records()


class _Reader:
    """One pass over the files. Owns the report, the screen and the quarantine."""

    def __init__(self, paths: Sequence[str], options: ReadOptions, report: ReadReport) -> None:
        self._paths, self._options, self._report = paths, options, report
        self._formats = formats.all_formats(options.labels)
        self._screen = Screen(options.ties, _strict_ids(options))
        self._quarantine: Quarantine | None = None
        if options.quarantine:
            self._quarantine = Quarantine(options.quarantine, paths, with_text=options.quarantine_text)
        report.policy, report.quarantine = options.ties, options.quarantine

    def records(self) -> Iterator[Record]:
        try:
            for path in self._paths:
                yield from self._generated() if path == STARTER else self._file(path)
            self._finish()
        finally:
            if self._quarantine:
                self._quarantine.abandon()

    def _finish(self) -> None:
        report = self._report
        report.check()
        report.strict_ids_missing = len(self._screen.missing_ids)
        if self._quarantine:
            self._quarantine.finish()
        if report.quarantined.total > self._options.max_bad_rows:
            raise BadRows(f"{report.complaint()}; at most {self._options.max_bad_rows} may be (--max-bad-rows)")

    def _generated(self) -> Iterator[Record]:
        from plaudit_model.starter import preference_records

        file = FileReport(STARTER, STARTER)
        self._report.files.append(file)
        for record in preference_records(self._options.starter_records, self._options.seed):
            file.rows += 1
            self._report.read += 1
            self._report.used += 1
            yield record

    def _file(self, path: str) -> Iterator[Record]:
        file = FileReport(path)
        self._report.files.append(file)
        try:
            format = self._format(file)
            for row in file_rows(Path(path), self._options.max_row_bytes):
                record = self._record(row, format, file)
                if record is not None:
                    yield record
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def _format(self, file: FileReport) -> Format | None:
        """The file's format. None if no row of it can be read: then there is nothing to tell it by."""
        rows = file_rows(Path(file.file), self._options.max_row_bytes)
        found = list(islice(_sample(rows), _SAMPLE_ROWS))
        if found:
            self._check_columns(found)
        sample = [self._renamed(row) for row in found]
        name = self._options.format if self._options.format != "auto" else named_by(self._options.columns)
        if name is None and not sample:
            return None
        file.detected = name is None
        format = self._formats[name] if name else formats.detect(sample, self._formats)
        file.format = format.name
        if unread := [ours for ours in self._options.columns if ours not in format.columns]:
            raise DataError(f"--columns names {', '.join(unread)}, which the format {format.name} does not read")
        LOG.info("%s: format %s%s", file.file, format.name, ", by its columns" if file.detected else "")
        return format

    def _check_columns(self, sample: Sequence[Columns]) -> None:
        """A mapped column that no row has is a mistake in the map, not in the rows."""
        for theirs in self._options.columns.values():
            if not any(theirs in row for row in sample):
                there = ", ".join(dict.fromkeys(key for row in sample for key in row))
                raise DataError(f"no row has the column {theirs!r} that --columns names; there are {there}")

    def _renamed(self, row: Columns) -> dict[str, Any]:
        columns = self._options.columns
        kept = {key: value for key, value in row.items() if key not in columns and key not in columns.values()}
        return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}

    def _record(self, row: Row, format: Format | None, file: FileReport) -> Record | None:
        """The row's record, if it is to be used."""
        file.rows += 1
        self._report.read += 1
        origin = Origin(file.file, row.frame.line)
        try:
            reading = self._parsed(row, format, file, origin)
        except BadRow as bad:
            self._report.quarantined.add(bad.defect.reason, origin, bad.defect.detail)
            if self._quarantine:
                self._quarantine.add(file.file, row.frame, bad.defect)
            return None
        except Dropped as dropped:
            self._report.dropped.add(dropped.reason, origin)
            return None
        return self._screened(reading)

    def _parsed(self, row: Row, format: Format | None, file: FileReport, origin: Origin) -> Reading:
        if isinstance(row.content, Defect):
            raise BadRow(row.content.reason, row.content.detail)
        if format is None:
            raise DataError("the file changed while it was read")
        columns = self._renamed(row.content)
        file.ignore(key for key in columns if key not in format.columns)
        return format.parse(columns, origin)

    def _screened(self, reading: Reading) -> Record | None:
        report, screened = self._report, self._screen.examine(reading)
        if isinstance(screened, str):
            report.dropped.add(screened, reading.record.origin)
            report.ties += screened == "tie"
            return None
        comparison = screened.record.comparisons[0]
        report.used += 1
        report.ties += comparison.outcome == "tie"
        report.voted += comparison.votes is not None
        for note in screened.notes:
            report.noted.add(note, screened.record.origin)
        return screened.record


def named_by(columns: Mapping[str, str]) -> str | None:
    """The format that a column map speaks of, if it does."""
    if columns.keys() & {"chosen", "rejected"}:
        return preference.FORMAT.name
    return pairs.NAME if columns.keys() & {"response_a", "response_b", "label"} else None


def file_rows(path: Path, limit: int) -> Iterator[Row]:
    """The rows of one file, by its suffix. Raises DataError."""
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    with opened(path) as stream:
        if kind in (".jsonl", ".ndjson"):
            yield from json_rows.line_rows(stream, limit)
        elif kind == ".json":
            yield from json_rows.file_rows(stream, limit)
        elif kind in (".csv", ".tsv"):
            yield from csv_rows.cell_rows(stream, limit, csv_rows.separator(stream) if kind == ".csv" else "\t")
        else:
            raise DataError("only files named .jsonl, .ndjson, .json, .csv or .tsv are read, each also with .gz")


def _sample(rows: Iterator[Row]) -> Iterator[Columns]:
    """The first rows that can be read: enough to know a format by, not more than fit in memory."""
    size = 0
    for row in rows:
        if not isinstance(row.content, Defect):
            yield row.content
            size += len(row.frame.raw)
            if size > _SAMPLE_BYTES:
                return


def _strict_ids(options: ReadOptions) -> frozenset[str] | None:
    """The ids listed in the file. Raises DataError if there are none."""
    if options.strict_ids is None:
        return None
    try:
        with opened(options.strict_ids) as stream:
            frames = line_frames(stream, options.max_row_bytes)
            ids = frozenset(filter(None, (frame.text().strip() for frame in frames)))
    except (DataError, BadRow) as error:
        raise DataError(f"{options.strict_ids}: {error}") from error
    if not ids:
        raise DataError(f"{options.strict_ids} lists no id")
    return ids
