"""Several models as one: the rules by hand, then through clients."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING

import pytest

from plaudit import AsyncClient, AsyncEnsemble, Client, Combination, Ensemble, errors
from plaudit._ensemble import combined
from plaudit.types import Identity, ItemError, ScoreResult, Scores

if TYPE_CHECKING:
    from conftest import WireServer


def scores(*values: float | None, revision: str = "r", transform: str = "none") -> Scores:
    failed = ItemError("too_long", "cut it")
    results = tuple(ScoreResult(v, i, i, error=failed if v is None else None) for i, v in enumerate(values))
    return Scores(results, Identity("m", revision, "n"), transform)


@pytest.mark.parametrize(("how", "expected"), [("mean", 2.0), ("min", 1.0), ("mean-std", 2.0 - 0.5 * (2 / 3) ** 0.5)])
def test_the_rules(how: str, expected: float) -> None:
    members = [scores(1.0), scores(2.0), scores(3.0)]
    (result,) = combined(members, Combination(how))  # type: ignore[arg-type]
    assert result.score == pytest.approx(expected, abs=1e-15)
    assert result.extra == {"members": [1.0, 2.0, 3.0], "std": pytest.approx((2 / 3) ** 0.5)}


def test_what_one_member_cannot_score_has_no_score() -> None:
    both = combined([scores(1.0, 2.0), scores(3.0, None)], Combination())
    assert both.scores == [2.0, None] and [r.error.code for r in both.failed if r.error] == ["too_long"]
    assert both[1].index == 1


def test_the_identity_changes_with_any_member() -> None:
    first, second = (combined([scores(1.0), scores(1.0, revision=r)], Combination()).identity for r in ("a", "b"))
    assert first != second and first is not None and first.revision == "r+a"
    assert (
        combined([scores(1.0), Scores((ScoreResult(None, error=ItemError("e", "")),))], Combination()).identity is None
    )


def test_scores_on_different_scales_are_not_added_up() -> None:
    with pytest.raises(errors.ConfigurationError, match="different transforms: none, normalized"):
        combined([scores(1.0), scores(1.0, transform="normalized")], Combination())


@pytest.mark.parametrize("wrong", [{"how": "median"}, {"penalty": -1.0}, {"penalty": float("nan")}])
def test_a_rule_that_is_none(wrong: dict[str, object]) -> None:
    with pytest.raises(errors.ConfigurationError):
        Combination(**wrong)  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigurationError):
        Ensemble([])


def test_members_are_asked_and_combined_in_order(server: WireServer, twin: WireServer) -> None:
    items = [("p", str(n)) for n in range(50)]
    expected = [server.score_of(*item) for item in items]
    ensemble = Ensemble([Client(server.url), Client(twin.url)], "mean-std")
    assert ensemble.score_items(items).scores == expected
    assert copy.deepcopy(ensemble).members[0].settings == ensemble.members[0].settings
    assert ensemble.score_items(iter(items))[7].extra["std"] == 0.0

    async def run() -> Scores:
        async with AsyncClient(server.url) as one, AsyncClient(twin.url) as other:
            return await AsyncEnsemble([one, other], "min").score_items(iter(items))

    assert asyncio.run(run()).scores == expected
    for member in ensemble.members:
        member.close()


def test_a_member_that_fails_fails_the_call_with_its_own_error(server: WireServer, twin: WireServer) -> None:
    twin.fail(*[{"status": 401, "body": {"error": {"code": "key", "message": "no"}}}] * 2)
    with Client(server.url) as one, Client(twin.url) as other, pytest.raises(errors.Unauthorized):
        Ensemble([one, other]).score_items([("p", "r")])

    async def run() -> None:
        async with AsyncClient(server.url) as one, AsyncClient(twin.url) as other:
            await AsyncEnsemble([one, other]).score_items([("p", "r")])

    with pytest.raises(errors.Unauthorized):
        asyncio.run(run())
