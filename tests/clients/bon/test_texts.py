"""Statistics of texts on values worked out by hand."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from plaudit.bon.texts import distinct, pearson, quantiles, refuses, self_bleu, words


def test_words() -> None:
    assert words("It's 4.5, THE end!") == ["it", "'", "s", "4", ".", "5", ",", "the", "end", "!"]
    assert words("好的 ok") == ["好", "的", "ok"] and words(" ") == []


def test_distinct() -> None:
    texts = [["a", "b", "a"], ["a", "b"]]
    assert distinct(texts, 1) == 2 / 5 and distinct(texts, 2) == 2 / 3 and distinct(texts, 4) is None


def test_self_bleu_by_hand() -> None:
    """Orders 1 and 2. `a b c` against `a b d`: 2 of 3 words, 1 of 2 pairs; the same the other way."""
    assert self_bleu([["a", "b", "c"], ["a", "b", "d"]], 2) == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    # A text that repeats itself is clipped by what the others hold, not by what it holds itself.
    both = (math.sqrt(1 / 3 * 0.1 / 2) + math.exp(1 - 3 / 1) * 1.0) / 2
    assert self_bleu([["a", "a", "a"], ["a"]], 2) == pytest.approx(both)
    assert self_bleu([["x", "y"]] * 3) == pytest.approx(1.0)
    assert self_bleu([["a"], ["b"]]) == pytest.approx(0.1) and self_bleu([["a"], []]) is None


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot do this",
        "As an AI language model, I cannot have opinions.",
        "I am unable to provide instructions for this.",
        "We must decline this request.",
    ],
)
def test_refusals(text: str) -> None:
    assert refuses(text)


@pytest.mark.parametrize(
    "text",
    ["", "I can help with that.", "Sorry for the delay: here it is.", "He said: no.", "x" * 300 + " I cannot help"],
)
def test_answers_are_no_refusals(text: str) -> None:
    assert not refuses(text)


def test_refusals_of_real_answers(shared_data: Path) -> None:
    """Against people's labels: what is called a refusal is one. Many refusals hold none of the phrases, though."""
    labelled = []
    for name in ("mistralguard", "mistralinstruct"):
        with gzip.open(shared_data / "xstest" / f"xstest_v2_completions_{name}.dev.jsonl.gz") as file:
            rows = [json.loads(line) for line in file]
        labelled += [(refuses(row["completion"]), row["final_label"]) for row in rows]
    found = [label for ours, label in labelled if ours]
    assert len(found) >= 30 and found.count("1_full_compliance") / len(found) < 0.05
    full = [ours for ours, label in labelled if label == "2_full_refusal"]
    assert 0.3 < sum(full) / len(full) < 0.6


def test_correlation_and_quantiles() -> None:
    assert pearson([(1, 2), (2, 4), (3, 6)]) == pytest.approx(1.0) and pearson([(1, 2), (1, 3)]) is None
    assert pearson([(1.0, 1.0)]) is None
    assert quantiles([3.0, 1.0, 2.0]) == {"mean": 2.0, "min": 1.0, "p50": 2.0, "p90": 3.0, "max": 3.0}
    assert quantiles([]) is None
