"""Every term on awkward inputs, and how values are put together."""

from __future__ import annotations

import itertools
import math
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from plaudit.errors import ConfigurationError
from plaudit.rewards.compose import Composer
from plaudit.rewards.config import Exact, JsonSchema, Length, Model, Numeric, Regex, Rewards, Term, read_rewards
from plaudit.rewards.terms import TermError, number_in, schema_validator, value_of


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 and then 1,234.5 apples", Fraction(2469, 2)),
        ("-3", -3),
        ("\u22127", -7),
        ("3-5", 5),
        ("1-2/3", Fraction(2, 3)),
        ("6.02e23", 602 * 10**21),
        (".5 of it", Fraction(1, 2)),
        ("It is 42.", 42),
        ("50%", 50),
        ("12,34", 34),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"\boxed{\dfrac{-3}{4}} of 100", Fraction(-3, 4)),
        (r"\boxed{3} no, \boxed{ \$1{,}000\text{ dollars} }", 1000),
        (r"\boxed{x + 1} and 5", None),  # what is boxed is the answer
        (r"\boxed{} 5", None),
        (r"\boxed{1 and 2}", None),
        (r"\boxed{5", 5),  # not closed: the last number
        ("1/0", None),
        ("1e999999999", None),  # a number whose digits would fill the memory
        ("9" * 5000, None),
        ("\u0663", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_of_a_text(text: str, number: Fraction | int | None) -> None:
    assert number_in(text) == number


@pytest.mark.parametrize(
    ("term", "response", "reference", "value"),
    [
        (Numeric(name="n"), "0.1", 0.1, 1.0),
        (Numeric(name="n"), "0.30000000000000004", "0.3", 0.0),
        (Numeric(name="n", tolerance=0.1), "3.1", 3, 1.0),  # exactly at the edge, which floats would miss
        (Numeric(name="n", tolerance=0.1), "3.11", 3, 0.0),
        (Numeric(name="n", relative=0.01), "-99", -100, 1.0),
        (Numeric(name="n"), "words", 3, 0.0),
        (Numeric(name="n"), "72", "he paid 3 a day\n#### 72", 1.0),
        (Exact(name="e"), "  The\n Answer ", "the answer", 1.0),
        (Exact(name="e", case=True), "The answer", "the answer", 0.0),
        (Exact(name="e"), "b", ["a", "B"], 1.0),
        (Exact(name="e"), "7", 7, 1.0),
        (Exact(name="e", extract=r"#### (.*)"), "#### 1\n#### 2", "2", 1.0),
        (Exact(name="e", extract=r"#### (.*)"), "2", "2", 0.0),
        (Exact(name="e", extract=r"x(y)?"), "x", "", None),
        (Regex(name="r", pattern="^b", whole=False), "a\nb", None, 0.0),
        (Regex(name="r", pattern="(?m)^b"), "a\nb", None, 1.0),
        (Regex(name="r", pattern="a+", whole=True), "aaab", None, 0.0),
        (JsonSchema(name="j", schema={"type": "object", "required": ["x"]}), '```json\n{"x": 1}\n```', None, 1.0),
        (JsonSchema(name="j", schema={"type": "object", "required": ["x"]}), "{}", None, 0.0),
        (JsonSchema(name="j", schema={}), "NaN", None, 0.0),
        (JsonSchema(name="j", schema={}), "[" * 100_000, None, 0.0),
        (JsonSchema(name="j", schema={}), "", None, 0.0),
        (Length(name="l", limit=3), "abcd\u00e9", None, -2.0),
        (Length(name="l", limit=3, unit="words"), "a b", None, 0.0),
        (Numeric(name="n", reference_field="answer"), "4", {"answer": 4}, 1.0),
        (Numeric(name="n", reference_field="answer"), "4", {"other": 4}, None),
        (Numeric(name="n", reference_field="answer"), "4", 4, None),
        (Numeric(name="n"), "4", None, None),
        (Numeric(name="n"), "4", "four", None),
        (Numeric(name="n"), "1", True, None),
        (Exact(name="e"), "4", {"x": 1}, None),
        (Exact(name="e"), "4", [], None),
    ],
)
def test_values(term: Term, response: str, reference: Any, value: float | None) -> None:
    if value is not None:
        assert value_of(term, response, reference) == value
        return
    with pytest.raises(TermError) as failure:  # a reference that is none is never a wrong answer
        value_of(term, response, reference)
    assert failure.value.code in ("missing_reference", "bad_reference")


ENDLESS = "a" * 40 + "!"
BACKTRACKS = "(a|aa)+$"


@pytest.mark.parametrize(
    ("term", "response"),
    [
        (Regex(name="r", pattern=BACKTRACKS), ENDLESS),
        (Regex(name="r", pattern=BACKTRACKS, whole=True), ENDLESS),
        (Exact(name="e", extract=BACKTRACKS), ENDLESS),
        (Exact(name="e", extract="x*y|."), "x" * 100_000),
        (JsonSchema(name="j", schema={"items": {"pattern": BACKTRACKS}}), f'["{ENDLESS}"]'),
        (JsonSchema(name="j", schema={"propertyNames": {"pattern": BACKTRACKS}}), f'{{"{ENDLESS}": 1}}'),
        (
            JsonSchema(
                name="j",
                schema={
                    "$schema": "https://json-schema.org/draft/2020-12/schema",
                    "$defs": {"a": {"pattern": BACKTRACKS}},
                    "$ref": "#/$defs/a",
                },
            ),
            f'"{ENDLESS}"',
        ),
    ],
)
def test_a_pattern_that_backtracks_without_end_is_given_up(term: Term, response: str) -> None:
    with pytest.raises(TermError) as failure:
        value_of(term, response, "reference")
    assert failure.value.code == "pattern_timeout"


def test_a_process_that_stands_still_between_matches_has_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(moments)))
    assert value_of(Exact(name="e", extract=r"\d"), "1 2 3", "3") == 1.0


@pytest.mark.parametrize("text", ["```" + "\n" * 50_000, "```json" + " \n" * 50_000, "```\n" * 50_000])
def test_our_own_patterns_are_linear_in_a_response(text: str) -> None:
    assert value_of(JsonSchema(name="j", schema={}), text, None) == 0.0


def test_json_that_a_schema_follows_too_deep_does_not_fit() -> None:
    schema = {"items": {"$ref": "#"}, "type": "array"}
    assert value_of(JsonSchema(name="j", schema=schema), "[" * 900 + "]" * 900, None) == 0.0
    assert value_of(JsonSchema(name="j", schema=schema), "[[[]]]", None) == 1.0


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"patternProperties": {"a": {}}}, "patternProperties"),
        ({"items": [{"anyOf": [{"patternProperties": {}}]}]}, "none"),
        ({"properties": {"x": {"anyOf": [{"patternProperties": {}}]}}}, "patternProperties"),
        ({"$defs": {"x": {"$schema": "http://json-schema.org/draft-07/schema#"}}}, "$schema"),
        ({"pattern": "("}, "is not a 'regex'"),
        ({"pattern": r"(?P<n>a)(?P=m)"}, "the schema is none"),
    ],
)
def test_a_schema_whose_searches_cannot_be_bounded_is_refused(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError) as failure:
        schema_validator(JsonSchema(name="j", schema=schema))
    assert reason in str(failure.value)


def test_tokens_are_those_that_the_model_counted() -> None:
    term = Length(name="l", limit=10, unit="tokens", of="m")
    assert value_of(term, "anything", None, tokens=14) == -4.0
    with pytest.raises(TermError):
        value_of(term, "anything", None)


TERMS = (
    Model(name="m", url="http://x", weight=0.5, clip=[-2, 2]),
    Numeric(name="n", weight=2.0, required=True),
    Length(name="l", limit=1, weight=0.01, required=True, least=-100),
)


@pytest.mark.parametrize(
    ("values", "reward", "gate"),
    [
        ((1.5, 1.0, 0.0), 2.75, None),
        ((9.0, 1.0, -50.0), 2.5, None),
        ((-9.0, 1.0, 0.0), 1.0, None),
        ((9.0, 0.0, 0.0), -7.0, "n"),
        ((9.0, 1.0, -101.0), -7.0, "l"),
        ((9.0, 0.0, -101.0), -7.0, "n"),
    ],
)
def test_the_sum_of_weighted_clipped_values_or_the_floor(
    values: tuple[float, ...], reward: float, gate: str | None
) -> None:
    found, failed = Rewards(TERMS, floor=-7.0).combine(dict(zip("mnl", values, strict=True)))
    assert found == pytest.approx(reward) and failed == gate


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_no_reward(bad: float) -> None:
    rewards = Rewards((Model(name="m", url="http://x"), TERMS[1]))
    with pytest.raises(ValueError):
        rewards.combine({"m": bad, "n": 0.0})


GOOD = '[[terms]]\nkind = "numeric"\n'


def test_a_file_is_read_whole_and_its_hash_is_of_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "rewards.toml"
    text = 'floor = -3\n[[terms]]\nkind = "model"\nurl = "http://127.0.0.1:1"\nclip = [-4, 4.5]\n' + GOOD
    path.write_text(text)
    first = read_rewards(path)
    assert [term.name for term in first.terms] == ["model", "numeric"] and first.floor == -3.0
    path.write_text("# a comment\n" + text)
    assert read_rewards(path).sha256 == first.sha256
    path.write_text(text.replace("clip", "attempt_seconds = 9\nclip"))
    assert read_rewards(path).sha256 == first.sha256, "how long it is waited for makes no other reward"
    client = Composer(read_rewards(path))._clients["model"]
    assert (client.settings.timeout, client.settings.attempt_timeout) == (120.0, 9.0)
    path.write_text(text.replace("-3", "-4"))
    assert read_rewards(path).sha256 != first.sha256


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no [[terms]]"),
        ("x = [", "TOML"),
        ("florr = 1\n" + GOOD, "'florr'"),
        ('floor = "low"\n' + GOOD, "floor"),
        ("floor = nan\n" + GOOD, "floor"),
        (GOOD + GOOD, "two terms"),
        ('[[terms]]\nkind = "magic"\n', "'magic'"),
        (GOOD + "wieght = 1\n", "'wieght'"),
        (GOOD + 'weight = "1"\n', "weight"),
        (GOOD + "weight = true\n", "weight"),
        (GOOD + "weight = inf\n", "finite"),
        (GOOD + "tolerance = -1\n", "tolerance"),
        (GOOD + "clip = [1, 0]\n", "clip"),
        (GOOD + "clip = [1]\n", "clip"),
        ('[[terms]]\nkind = "regex"\n', "pattern"),
        ('[[terms]]\nkind = "regex"\npattern = "("\n', "regex"),
        ('[[terms]]\nkind = "exact"\nextract = "["\n', "exact"),
        ('[[terms]]\nkind = "length"\nlimit = 5\nrequired = true\n', "least"),
        ('[[terms]]\nkind = "length"\nlimit = 5\nunit = "tokens"\n', "of"),
        ('[[terms]]\nkind = "length"\nlimit = 5\nunit = "pages"\n', "unit"),
        ('[[terms]]\nkind = "model"\n', "url"),
        ('[[terms]]\nkind = "code"\nseconds = 0\n', "seconds"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "rewards.toml").write_text(text)
    with pytest.raises(ConfigurationError) as failure:
        read_rewards(tmp_path / "rewards.toml")
    assert reason in str(failure.value)
