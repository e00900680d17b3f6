"""Charts: what is drawn where, what is left out, and texts that stay texts."""

import math
import re
from xml.etree import ElementTree

import pytest

from plaudit_model.charts import Series, chart, page, table, ticks


def shapes(svg: str, tag: str) -> list[ElementTree.Element]:
    return [element for element in ElementTree.fromstring(svg).iter() if element.tag.endswith(f"}}{tag}")]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in shapes(svg, "text")]


def points(shape: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, spot.split(","))) for spot in shape.get("points", "").split()]  # type: ignore[misc]


def test_a_gap_is_no_line_and_its_neighbours_stay() -> None:
    for gap in (None, math.nan, math.inf):
        svg = chart([Series("", range(5), [1.0, 2.0, gap, 4.0, 5.0])], "loss")
        assert [len(points(line)) for line in shapes(svg, "polyline")] == [2, 2]
        assert "nan" not in svg and "inf" not in svg and "None" not in svg


def test_one_value_alone_has_a_dot_and_none_still_has_axes() -> None:
    assert len(shapes(chart([Series("", [3], [0.5])], "one"), "circle")) == 1
    assert {"0", "0.5", "1"} <= set(texts(chart([Series("", [], []), Series("", [1], [None])], "none")))


def test_axes_carry_round_numbers_that_lie_where_they_belong() -> None:
    svg = chart([Series("", [0, 1000], [0.0, 0.4])], "t", "step", "nats")
    assert {"step", "nats", "0", "0.2", "0.4", "500", "1,000"} <= set(texts(svg))
    (x0, y0), (x1, y1) = points(shapes(svg, "polyline")[0])
    half = next(element for element in shapes(svg, "text") if element.text == "500")
    assert float(half.get("x", "")) == pytest.approx((x0 + x1) / 2, abs=0.2)
    assert y1 < y0, "more is higher up"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 12345), (0.5, 0.52), (1e-6, 3e-5), (999_999, 1_000_001)])
def test_ticks_are_few_and_round_and_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low <= value * (1 + 1e-12) and value <= high * (1 + 1e-12) for value in found)
    steps = {f"{(b - a):.3e}"[:5] for a, b in zip(found, found[1:], strict=False)}
    assert steps <= {"1.000", "2.000", "5.000"}


def test_a_band_goes_there_on_top_and_back_below() -> None:
    svg = chart([Series("accuracy", [0, 1], [0.5, 0.6], [0.4, 0.5], [0.6, 0.7])], "t")
    (band,) = shapes(svg, "polygon")
    (low0, low1, high1, high0) = (y for _, y in points(band))
    middle0, middle1 = (y for _, y in points(shapes(svg, "polyline")[-1]))
    assert low0 > middle0 > high0 and low1 > middle1 > high1


def test_many_points_are_thinned_without_losing_a_peak_or_a_gap() -> None:
    values: list[float | None] = [0.0] * 50_000
    values[31_234], values[40_000] = 9.0, None
    svg = chart([Series("", range(50_000), values)], "t")
    lines = [points(line) for line in shapes(svg, "polyline")]
    assert len(lines) == 2 and sum(map(len, lines)) < 1000
    assert "8" in texts(svg) and min(y for _, y in lines[0]) == pytest.approx(34, abs=0.2)


def test_where_no_interval_is_known_the_value_still_stands() -> None:
    svg = chart([Series("", [0, 1, 2], [1, 2, 3], [0, None, 2], [2, 3, None])], "t")
    (band,), (line,) = shapes(svg, "polygon"), shapes(svg, "polyline")
    lows, highs = points(band)[:3], points(band)[:2:-1]
    assert lows[1:] == highs[1:] == points(line)[1:] and lows[0] != highs[0]


def test_texts_of_users_stay_texts_in_attributes_and_between_tags() -> None:
    nasty = """<script>alert('1')</script>&"' """
    svg = chart([Series(nasty, [0, 1], [0, 1])], nasty, nasty, nasty)
    assert texts(svg).count(nasty) == 4
    assert ElementTree.fromstring(svg).get("aria-label") == nasty and ElementTree.fromstring(svg).get("role") == "img"
    whole = page(nasty, svg, table(["a", nasty], [[nasty, 1]]))
    assert "<script" not in whole and whole.count("&lt;script&gt;") == 9


def test_a_column_without_a_letter_is_set_to_the_right_with_its_head() -> None:
    shown = table(["source", "accuracy"], [["one", 0.5], ["two", "0.4 .. 0.6"]])
    assert re.findall(r"<(?:th|td)( class=number)?>([^<]*)", shown) == [
        ("", "source"), (" class=number", "accuracy"), ("", "one"), (" class=number", "0.5"), ("", "two"),
        (" class=number", "0.4 .. 0.6"),
    ]  # fmt: skip
    assert "class=number" not in table((), [["a", "b"], ["c", 1]]) and "<th>a</th>" in table(["a"], [])


def test_a_long_legend_takes_more_lines_and_keeps_off_the_axes() -> None:
    svg = chart([Series(f"a source with a long name {i}", [0, 1], [i, i]) for i in range(8)], "t")
    lowest = max(float(e.get("y", "")) for e in shapes(svg, "text") if "source" in (e.text or ""))
    highest = min(float(re.findall(r"M[\d.]+ ([\d.]+)H", path.get("d", ""))[0]) for path in shapes(svg, "path"))
    assert lowest < highest
    assert int(ElementTree.fromstring(svg).get("height", "")) > 300


def test_columns_of_other_lengths_are_an_error() -> None:
    with pytest.raises(ValueError):
        chart([Series("", [0, 1], [0])], "t")
