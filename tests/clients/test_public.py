"""What the package exports, and the small promises of its values."""

from __future__ import annotations

import copy
import math

import pytest

import plaudit
from plaudit import errors
from plaudit._http import _KINDS, failure_of_error, http
from plaudit.types import ItemError, Ranking, ScoreResult, Scores

EXPORTS = """
    AsyncClient AsyncEnsemble Attempt BadRequest Client Combination Comparison ConfigurationError ConnectionFailed
    DeadlineExceeded Ensemble Identity InvalidInput
    Item ItemError ItemFailed Message NotFound OutputFailed Overloaded PlauditError Prompt Ranking Refused
    ResponseInvalid RetryPolicy RevisionChanged ScoreResult Scores ServerFailed ServerInfo Settings TimedOut Timing
    Truncation Unauthorized Unavailable Usage assistant system user
"""


def test_the_exports_are_these_and_no_others() -> None:
    assert sorted(EXPORTS.split()) == plaudit.__all__ == sorted(plaudit.__all__)
    public = {name for name, value in vars(plaudit).items() if not name.startswith("_") and not _is_module(value)}
    assert public == set(plaudit.__all__)


def _is_module(value: object) -> bool:
    return type(value).__name__ == "module"


def test_every_error_is_exported_drawn_and_has_an_exit_code() -> None:
    classes = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    raised = {name: kind for name, kind in classes.items() if issubclass(kind, Exception)}
    assert set(raised) <= set(plaudit.__all__)
    drawn = [line for line in (errors.__doc__ or "").splitlines() if line and line.split()[0] in raised]
    assert sorted(line.split()[0] for line in drawn) == sorted(raised)
    for line in drawn:
        kind = raised[line.split()[0]]
        depth = (len(line) - len(line.lstrip())) // 2
        assert len([base for base in kind.__mro__ if base in raised.values()]) == depth + 1, line
        assert kind.exit_code in {1, 65, 69, 74, 78}


def test_an_error_can_be_copied_with_all_it_knows() -> None:
    error = errors.Overloaded("later", url="http://h", request_id="q", code="at_capacity", retry_after=2.0)
    twin = copy.deepcopy(error)
    assert (str(twin), vars(twin)) == (str(error), vars(error)) and twin.retry_after == 2.0


def test_every_error_of_the_http_library_has_a_kind() -> None:
    def subclasses(kind: type[Exception]) -> set[type[Exception]]:
        return {kind}.union(*(subclasses(below) for below in kind.__subclasses__()))

    for kind in subclasses(http.RequestError):
        assert any(issubclass(kind, known) for known, _ in _KINDS)
    assert failure_of_error(http.ConnectTimeout("slow")).kind == "connect"
    assert failure_of_error(http.ReadTimeout("slow")).kind == "timeout"
    assert failure_of_error(http.RemoteProtocolError("gone")).kind == "broken"
    assert failure_of_error(http.ReadError("")).message == "ReadError"


def test_a_missing_score_is_never_a_number() -> None:
    failed = ScoreResult(None, index=3, error=ItemError("too_long", "cut it"))
    with pytest.raises(errors.ItemFailed, match="too_long: cut it") as caught:
        float(failed)
    assert caught.value.index == 3
    assert float(ScoreResult(0.0)) == 0.0


def test_scores_as_an_array_have_nan_where_there_is_no_score() -> None:
    array = Scores((ScoreResult(1.5), ScoreResult(None, error=ItemError("e", "")))).numpy()
    assert array.dtype == "float64" and array[0] == 1.5 and math.isnan(array[1])


def test_the_best_of_nothing_is_an_error() -> None:
    with pytest.raises(errors.ItemFailed, match="none is the best"):
        _ = Ranking((), (), None).best
