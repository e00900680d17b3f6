"""Answers are strict JSON, whatever is in them."""

import json
import math

import pytest

from plaudit_server.results import dumps


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_json_number_is_never_sent(value):
    with pytest.raises(ValueError, match="JSON"):
        dumps({"scores": [0.5, value]})


def test_words_that_look_like_such_numbers_are_text():
    value = {
        "model": "NaN-Infinity",
        "scores": [1e-7, -0.0, 1e300, 0.1 + 0.2],
        "none": None,
        "caf\u00e9": [True, 2**60],
    }
    assert json.loads(dumps(value)) == value
    assert json.loads(dumps({"model": "small"})) == {"model": "small"}
