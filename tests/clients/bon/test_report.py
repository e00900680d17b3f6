"""`plaudit bon report`: the numbers of a file, as lines, as JSON and as a page."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

Bon = Callable[..., tuple[int, str, str]]
Write = Callable[..., str]


@pytest.fixture
def source(bon: Bon, write: Write, samples: Any) -> str:
    """40 prompts, 16 samples: the gold score follows the score up to a point, and longer answers score higher."""
    chance = random.Random(1)
    rows = samples(40, 16, lambda p, i: chance.gauss(0, 1))
    for row in rows:
        row["gold_score"] = row["score"] - 0.4 * row["score"] ** 2 + chance.gauss(0, 0.3)
        row["response"] = "word " * round(10 + 4 * row["score"]) + str(row["index"])
        row |= {"tokens": 7, "finish_reason": "length" if row["index"] == 0 else "stop"}
    rows[0]["response"] = "I'm sorry, but I cannot help with that."
    rows[1] |= {"score": None, "error": {"code": "too_long"}}
    return write("s.jsonl", rows)


def test_the_numbers(source: str, bon: Bon) -> None:
    code, out, _ = bon("report", source, "--gold", "gold_score", "--json", "--resamples", "100")
    found = json.loads(out)
    assert code == 0 and (found["prompts"], found["samples"]) == (40, 640)
    assert found["failed"] == {"samples": 1, "share": 1 / 640, "too_long": 1}
    best = found["best_of_n"]
    assert (best["n_max"], best["prompts"], best["prompts_with_fewer_samples"]) == (16, 39, 1)
    assert [point["n"] for point in best["curve"]] == list(range(1, 17))
    last = best["curve"][-1]
    assert last["kl_upper_bound"] == pytest.approx(math.log(16) - 15 / 16)
    assert last["score"] == pytest.approx(1.77, abs=0.2) and last["score_error"] < 0.2  # E[max of 16 normals] = 1.766
    golds = [point["gold"] for point in best["curve"]]
    assert max(golds) > golds[-1] > 0.2 and best["fit"]["gold"]["beta"]["low"] > 0  # it bends down, surely
    assert best["fit"]["score"]["alpha"]["low"] > 1
    assert found["length"]["correlation_with_score_within_prompts"] > 0.9
    assert found["refusals"]["share"] == 1 / 640 and found["cut_by_the_token_limit"] == 40 / 640
    assert found["length"]["tokens"]["mean"] == 7 and found["diversity"]["prompts"] == 40
    assert 0 < found["diversity"]["distinct_1"] < found["diversity"]["distinct_2"] < 1
    assert found["diversity"]["self_bleu_4"] > 0.7


def test_lines_and_page(source: str, bon: Bon) -> None:
    code, out, _ = bon("report", source, "--gold", "gold_score", "--html", "r.html", "--resamples", "20")
    assert code == 0 and "n 16  kl_upper_bound 1.8351  score 1." in out and "\nn 3 " not in out
    assert "best_of_n.fit.gold.beta.low: " in out and "failed.too_long: 1" in out
    page = Path("r.html").read_text()
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    lines = [[tuple(map(float, xy.split(","))) for xy in one.attrib["points"].split()] for one in svg.iter("polyline")]
    assert len(lines) == 2 and all(len(line) == 16 for line in lines)
    assert all(0 <= x <= 760 and 0 <= y <= 400 for line in lines for x, y in line)
    assert [x for x, _ in lines[0]] == sorted(x for x, _ in lines[0])
    ys = [y for _, y in lines[0]]
    assert ys == sorted(ys, reverse=True)  # the score rises with n, so the line does
    assert "KL upper bound" in page and "<script" not in page and "http" not in page


def test_the_largest_n_can_be_set(source: str, bon: Bon) -> None:
    best = json.loads(bon("report", source, "--json", "--n-max", "15", "--resamples", "5")[1])["best_of_n"]
    assert best["n_max"] == 15 and best["prompts"] == 40 and "gold" not in best["curve"][0]
    best = json.loads(bon("report", source, "--json", "--n-max", "99")[1])["best_of_n"]
    assert best["prompts"] == 0 and best["curve"] == []


def test_what_cannot_be_computed_is_said(bon: Bon, write: Write, samples: Any) -> None:
    one = write("one.jsonl", samples(1, 1, lambda p, i: 1.0))
    code, out, _ = bon("report", one, "--html", "r.html")
    assert code == 0 and "length.correlation_with_score: not computable" in out
    assert "diversity.self_bleu_4: not computable" in out and "best_of_n.fit.score: not computable" in out
    nothing = write("none.jsonl", samples(2, 2, lambda p, i: None))
    code, out, _ = bon("report", nothing, "--html", "r.html")
    assert code == 0 and "failed.share: 1" in out and "best_of_n.prompts: 0" in out
    assert bon("report", one, "--gold", "gold_score")[0] == 65
