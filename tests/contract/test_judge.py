"""What a judge writes is what training reads."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from plaudit.judge.constitution import Constitution, Principle
from plaudit.judge.label import Asking, Heard, Judge, Pair, Routing, row_of
from plaudit.judge.verdicts import Opinion, Order, Verdict
from plaudit_training.cli_data import app
from plaudit_training.sources import ReadOptions, load


def opinion(order: Order, verdict: Verdict) -> Opinion:
    shares = {"a": (1.0, 0.0, 0.0), "b": (0.0, 1.0, 0.0), "tie": (0.0, 0.0, 1.0)}[verdict]
    return Opinion(order, verdict, verdict, shares, False, "why", ())


def test_labels_are_read_by_training_and_by_inspect(tmp_path: Path) -> None:
    judge = Judge(None, Constitution("1", (Principle("p", "text"),)), Asking("m"))  # type: ignore[arg-type]
    verdicts: list[tuple[Verdict, Verdict]] = [("a", "a"), ("b", "b"), ("tie", "tie"), ("a", "b")]
    heard = [Heard((opinion("ab", one), opinion("ba", other))) for one, other in verdicts]
    heard.append(Heard(unreadable=("ab: nothing",)))
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    rows = [
        row_of(Pair(n, [*prompt[:1], {"role": "user", "content": f"Why {n}?"}], "x", "y", {}), one, judge, Routing())
        for n, one in enumerate(heard)
    ]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, report = load([str(path)], ReadOptions())
    comparisons = [record.comparisons[0] for record in records]
    assert [comparison.outcome for comparison in comparisons] == ["first", "second", "tie"]
    assert {comparison.source for comparison in comparisons} == {"ai"} and comparisons[0].annotators == ("m",)
    assert report.dropped.counts == {"unlabelled": 2} and report.read == 5 and not report.quarantined.total
    run = CliRunner().invoke(app, ["inspect", str(path), "--json"])
    found = json.loads(run.stdout)
    assert run.exit_code == 0 and found["summary"]["records"] == 3 and found["files"][0]["format"] == "pairs"


def test_a_column_named_source_that_means_something_else_changes_nothing(tmp_path: Path) -> None:
    row = {"prompt": "p", "response_a": "x", "response_b": "y", "label": "a", "source": "some-data-set"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    records, _ = load([str(tmp_path / "pairs.jsonl")], ReadOptions())
    assert records[0].comparisons[0].source == "human"
