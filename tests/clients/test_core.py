"""The plans, carried out by hand: no socket, no thread, and a clock that only moves when a plan sleeps."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from plaudit import Attempt, errors
from plaudit._core import UNASKED, Core
from plaudit._plan import Gather, Heard, Plan, Send, Sleep
from plaudit._retry import Failure, RetryPolicy
from plaudit._settings import Settings
from plaudit._wire import Reply, Request

IDENTITY = {"model": "m", "revision": "r1", "numerics": "n"}
Handler = Callable[[Request, dict[str, Any]], Reply | Failure]


class World:
    """Carries out plans. `handle` answers requests; `now` is the time."""

    def __init__(self, handle: Handler | None = None, *, spend: float = 0.0) -> None:
        self.handle = handle or answer
        self.spend = spend
        self.now = 100.0
        self.sent: list[tuple[str, dict[str, Any], float | None]] = []
        self.asked: list[str] = []
        self.slept: list[float] = []

    def run(self, plan: Plan[Any]) -> Any:
        value: Heard | None = None
        try:
            while True:
                value = Heard(value=self._perform(plan.send(value)), now=self.now)  # type: ignore[arg-type]
        except StopIteration as stop:
            return stop.value

    def _perform(self, step: Any) -> Any:
        match step:
            case Sleep(seconds):
                self.now += seconds
                self.slept += [seconds] if seconds else []
                return None
            case Send(url, request, seconds, left):
                self.asked.append(url)
                body = json.loads(request.body(left) or b"{}")
                self.sent.append((request.path, body, seconds))
                self.now += self.spend
                return self.handle(request, body)
            case Gather(plans):
                return [self.run(plan) for plan in plans]


def ok(body: Any) -> Reply:
    return Reply(200, {"x-request-id": "q"}, json.dumps(body).encode())


def refusal(status: int, code: str, **fields: Any) -> Reply:
    body = {"error": {"code": code, "message": "because", "request_id": "q7", **fields}}
    return Reply(status, {}, json.dumps(body).encode())


def scored(body: dict[str, Any], **identity: str) -> Reply:
    texts = [r for item in body["items"] for r in item.get("responses", [item.get("response")])]
    results: list[dict[str, Any]] = [{"index": i, "score": float(len(t))} for i, t in enumerate(texts)]
    for result, text in zip(results, texts, strict=True):
        if text == "bad":
            result |= {"score": None, "error": {"code": "too_long", "message": "cut it"}}
    scores = [result["score"] for result in results]
    return ok({**IDENTITY, **identity, "request_id": "q", "scores": scores, "results": results})


def answer(request: Request, body: dict[str, Any]) -> Reply | Failure:
    if request.path == "/info":
        return ok({**IDENTITY, "limits": {"max_items": 100, "max_body_bytes": 1 << 20}})
    return scored(body)


def core(**settings: Any) -> Core:
    return Core(Settings("http://h/base/", **settings), draw=lambda: 0.5)


def test_one_response_is_one_request_without_a_question_before() -> None:
    world = World()
    result = world.run(core(timeout=None).score("p", "four"))
    assert float(result) == 4.0
    body = {"items": [{"prompt": "p", "response": "four"}], "deadline_ms": 86_400_000}
    assert world.sent == [("/score", body, 120.1)]


def test_options_travel_with_the_items() -> None:
    world = World()
    client = core(
        model="m",
        revision="r1",
        overlong="truncate_prompt",
        transform="none",
        priority="batch",
        include=("attributes",),
        timeout=2.0,
    )
    world.run(client.score("p", "r"))
    assert world.sent[0][1] == {
        "items": [{"prompt": "p", "response": "r"}],
        "model": "m@r1",
        "overlong": "truncate_prompt",
        "transform": "none",
        "priority": "batch",
        "include": ["attributes"],
        "deadline_ms": 2000,
    }


def test_a_long_list_is_cut_by_the_servers_limits_and_joined_in_order() -> None:
    world = World()
    client = core()
    responses = ["x" * (n % 13) for n in range(250)]
    scores = world.run(client.score_responses("p", responses))
    assert scores.scores == [float(len(r)) for r in responses]
    assert [r.response_index for r in scores] == list(range(250))
    assert [path for path, _, _ in world.sent] == ["/info", "/score", "/score", "/score"]
    world.run(client.score_responses("p", responses))
    assert [path for path, _, _ in world.sent].count("/info") == 1


def test_a_short_list_is_sent_unasked() -> None:
    world = World()
    world.run(core().score_items([("p", "r")] * UNASKED.items))
    assert [path for path, _, _ in world.sent] == ["/score"]


def test_nothing_is_sent_for_an_empty_list() -> None:
    world = World()
    for scores in (world.run(core().score_items([])), world.run(core().score_responses("p", []))):
        assert scores.scores == [] and scores.identity is None
    assert world.sent == []


def test_an_item_without_a_score_raises_and_keeps_its_neighbours() -> None:
    with pytest.raises(errors.ItemFailed, match="1 of 3 items have no score; the first is item 1: too_long") as caught:
        World().run(core().score_responses("p", ["a", "bad", "ccc"]))
    assert caught.value.index == 1 and caught.value.code == "too_long" and caught.value.scores is not None
    assert caught.value.scores.scores == [1.0, None, 3.0]


def test_an_item_without_a_score_is_none_if_that_is_asked_for() -> None:
    scores = World().run(core(on_error="none").score_responses("p", ["a", "bad", "ccc"]))
    assert scores.scores == [1.0, None, 3.0]
    with pytest.raises(errors.ItemFailed, match="too_long"):
        float(scores[1])


@pytest.mark.parametrize("status", [413, 422])
def test_the_refusal_of_a_sole_item_is_the_items(status: int) -> None:
    kind = "item_error" if status == 422 else "invalid_request_error"
    world = World(lambda request, body: refusal(status, "too_long", type=kind))
    result = world.run(core(on_error="none").score("p", "r"))
    assert result.score is None and (result.error.code, result.error.message) == ("too_long", "because")
    with pytest.raises(errors.ItemFailed, match="too_long"):
        world.run(core().score("p", "r"))


def test_the_refusal_of_an_option_is_never_an_items() -> None:
    world = World(lambda request, body: refusal(422, "no_statistics", param="transform"))
    with pytest.raises(errors.BadRequest, match="no_statistics") as caught:
        world.run(core(on_error="none", transform="normalized").score("p", "r"))
    assert caught.value.param == "transform" and caught.value.status == 422


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (refusal(400, "bad_json"), errors.BadRequest),
        (refusal(422, "two_shapes"), errors.BadRequest),
        (refusal(401, "no_key"), errors.Unauthorized),
        (refusal(403, "no_access"), errors.Unauthorized),
        (refusal(404, "unknown_model"), errors.NotFound),
    ],
)
def test_a_refusal_is_raised_at_once_even_if_errors_are_to_be_none(reply: Reply, kind: type[Exception]) -> None:
    world = World(lambda request, body: reply)
    with pytest.raises(kind, match=r"http://h/base/score: .* \[request q7\]"):
        world.run(core(on_error="none").score_items([("p", "r")] * 2))
    assert len(world.sent) == 1


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (Failure("connect", "refused"), errors.ConnectionFailed),
        (Failure("broken", "reset"), errors.ConnectionFailed),
        (refusal(503, "at_capacity", retryable=True), errors.Overloaded),
        (refusal(503, "worker_failed", retryable=False), errors.ServerFailed),
        (refusal(429, "quota"), errors.Overloaded),
        (refusal(504, "deadline"), errors.DeadlineExceeded),
        (refusal(500, "bug"), errors.ServerFailed),
        (refusal(501, "never"), errors.ServerFailed),
    ],
)
def test_what_cannot_be_scored_now_raises_or_is_none(outcome: Any, kind: type[Exception]) -> None:
    retry = RetryPolicy(retries=2)
    with pytest.raises(kind) as caught:
        World(lambda request, body: outcome).run(core(retry=retry).score("p", "r"))
    assert isinstance(caught.value, errors.Unavailable) and caught.value.url == "http://h/base/score"
    result = World(lambda request, body: outcome).run(core(retry=retry, on_error="none").score("p", "r"))
    assert result.score is None and result.error.retryable and str(caught.value) == result.error.message


def test_retries_pause_longer_and_longer_and_the_deadline_sent_shrinks() -> None:
    left = 3

    def flaky(request: Request, body: dict[str, Any]) -> Reply | Failure:
        nonlocal left
        left -= 1
        return Failure("broken", "reset") if left >= 0 else scored(body)

    world = World(flaky, spend=1.0)
    assert float(world.run(core(timeout=60.0).score("p", "four"))) == 4.0
    assert world.slept == [0.1, 0.2, 0.4]
    assert [body["deadline_ms"] for _, body, _ in world.sent] == [60_000, 58_900, 57_700, 56_300]


def test_every_attempt_is_told_and_long_trouble_is_loud(caplog: pytest.LogCaptureFixture) -> None:
    left, heard = 20, list[Attempt]()

    def full(request: Request, body: dict[str, Any]) -> Reply | Failure:
        nonlocal left
        left -= 1
        return Failure("status", "full", status=503, code="overloaded") if left >= 0 else scored(body)

    patient = core(timeout=None, retry=RetryPolicy(retries=None), on_attempt=heard.append)
    with caplog.at_level(logging.WARNING, "plaudit"):
        assert float(World(full, spend=0.5).run(patient.score("p", "four"))) == 4.0
    assert [one.number for one in heard] == list(range(1, 22)) and {one.items for one in heard} == {1}
    assert [one.failure for one in heard] == ["503 overloaded"] * 20 + [None]
    assert {one.seconds for one in heard} == {0.5} and {one.url for one in heard} == {heard[0].url}
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and all("full; attempt" in line and "four" not in line for line in said)


def test_one_deadline_covers_all_attempts() -> None:
    world = World(lambda request, body: refusal(503, "at_capacity", retry_after_ms=4000), spend=1.0)
    with pytest.raises(errors.Overloaded, match=r"deadline; 2 attempts in 6\.4 s") as caught:
        world.run(core(timeout=10.0, retry=RetryPolicy(retries=None)).score("p", "r"))
    assert caught.value.retry_after == 4.0
    assert world.now < 110.0


def test_an_item_that_may_yet_be_scored_is_asked_for_again() -> None:
    left = 2

    def draining(request: Request, body: dict[str, Any]) -> Reply | Failure:
        nonlocal left
        left -= 1
        error = {"error": {"code": "draining", "message": "soon", "retryable": True}}
        results = [{"index": 0, "score": 1.0}, {"index": 1, "score": None, **error}]
        return ok({**IDENTITY, "scores": [1.0, None], "results": results}) if left >= 0 else scored(body)

    world = World(draining)
    assert world.run(core().score_responses("p", ["a", "b"])).scores == [1.0, 1.0] and len(world.sent) == 3
    left = 99
    scores = world.run(core(retry=RetryPolicy(retries=2), on_error="none").score_responses("p", ["a", "b"]))
    assert scores.scores == [1.0, None] and scores[1].error.retryable and len(world.sent) == 6
    with pytest.raises(errors.ItemFailed, match="draining: soon"):
        world.run(core(retry=RetryPolicy(retries=0)).score_responses("p", ["a", "b"]))


def test_a_timeout_is_the_clients_own() -> None:
    world = World(lambda request, body: Failure("timeout", "no answer"), spend=5.0)
    with pytest.raises(errors.TimedOut, match=r"within 5 s \(deadline; 1 attempts in 5\.0 s\).* raise timeout, or"):
        world.run(core(timeout=5.0).score("p", "r"))
    assert len(world.sent) == 1


class Silence(World):
    """Takes all the time that an attempt has and answers only the last of so many."""

    def __init__(self, silent: int) -> None:
        super().__init__(self._silent)
        self.left = silent

    def _silent(self, request: Request, body: dict[str, Any]) -> Reply | Failure:
        self.left -= 1
        self.now += self.sent[-1][2] or 0.0 if self.left >= 0 else 1.0
        return Failure("timeout", "silence") if self.left >= 0 else answer(request, body)


def test_silence_costs_an_attempt_and_the_server_knows_how_long_the_call_may_take() -> None:
    heard = list[Attempt]()
    world = Silence(2)
    client = core(attempt_timeout=7.0, on_attempt=heard.append)
    assert float(world.run(client.score("p", "four"))) == 4.0
    assert [seconds for _, _, seconds in world.sent] == [7.0] * 3 and world.slept == [0.1, 0.2]
    assert [body["deadline_ms"] for _, body, _ in world.sent] == [600_000, 592_900, 585_700]
    assert [(one.failure, one.seconds) for one in heard] == [("timeout", 7.0)] * 2 + [(None, 1.0)]


def test_without_a_limit_silence_ends_with_the_retries_and_the_error_tells_them() -> None:
    world = Silence(99)
    patient = core(timeout=None, attempt_timeout=7.0, retry=RetryPolicy(retries=2))
    with pytest.raises(errors.TimedOut, match=r"no complete answer within 7 s \(retries; 3 attempts in 21\.3 s\).*"
                                              "raise attempt_timeout"):  # fmt: skip
        world.run(patient.score("p", "r"))


def test_the_automatic_limit_has_a_share_for_each_item_and_doubles_where_it_was_too_short() -> None:
    world = Silence(6)
    world.run(core(timeout=None).score_responses("p", ["r"] * 50))
    assert [seconds for _, _, seconds in world.sent] == [125.0 * 2**n for n in (0, 1, 2, 3, 4, 4, 4)]


def test_the_automatic_limit_does_not_grow_with_other_failures() -> None:
    failures = iter(
        [Failure("connect", "refused"), refusal(503, "full"), Failure("timeout", "t"), Failure("broken", "")]
    )
    world = World(lambda request, body: next(failures, None) or answer(request, body))
    world.run(core(timeout=None).score("p", "r"))
    assert [seconds for _, _, seconds in world.sent] == [120.1] * 3 + [240.2] * 2


def test_a_deadline_that_is_nearer_is_the_limit() -> None:
    world = Silence(1)
    with pytest.raises(errors.TimedOut, match="1 attempts in 60"):
        world.run(core(timeout=60.0).score("p", "r"))
    with pytest.raises(errors.TimedOut, match="deadline; 3 attempts in 20"):
        (world := Silence(9)).run(core(timeout=20.0, attempt_timeout=8.0).score("p", "r"))
    assert [seconds for _, _, seconds in world.sent] == pytest.approx([8.0, 8.0, 3.7])


@pytest.mark.parametrize(("attempt_timeout", "limit"), [(None, 10.0), (60.0, 10.0), (3.0, 3.0)])
def test_what_needs_no_computing_is_not_waited_for_long(attempt_timeout: float | None, limit: float) -> None:
    world = World()
    world.run(core(timeout=None, attempt_timeout=attempt_timeout).score_items([("p", "r")] * (UNASKED.items + 1)))
    assert world.sent[0][::2] == ("/info", limit) and world.sent[1][2] != limit or attempt_timeout == limit


def test_a_silent_server_is_left_alone_and_the_other_is_asked_at_once() -> None:
    world = Silence(1)
    client = Core(Settings("http://a,http://b"), draw=lambda: 0.5)
    for _ in range(3):
        assert float(world.run(client.score("p", "four"))) == 4.0
    assert len(set(world.asked[:2])) == 2 and world.slept == [] and len(world.asked) == 4


def test_a_swap_in_the_middle_of_a_list_is_repeated_not_mixed() -> None:
    revisions = iter(["r1", "r1", "r2", "r2", "r2", "r2"])

    def swapping(request: Request, body: dict[str, Any]) -> Reply | Failure:
        return answer(request, body) if request.path == "/info" else scored(body, revision=next(revisions))

    scores = World(swapping).run(core().score_responses("p", ["x"] * 250))
    assert scores.revision == "r2" and len(scores) == 250


def test_servers_that_disagree_are_never_mixed() -> None:
    revisions = iter(["r1", "r2"] * 3)

    def divided(request: Request, body: dict[str, Any]) -> Reply | Failure:
        return answer(request, body) if request.path == "/info" else scored(body, revision=next(revisions))

    with pytest.raises(errors.RevisionChanged, match=r"m@r1 \(n\) and m@r2 \(n\)"):
        World(divided).run(core(on_error="none").score_responses("p", ["x"] * 250))


def test_a_pinned_revision_is_held() -> None:
    assert World().run(core(revision="r1").score("p", "r")).score == 1.0
    with pytest.raises(errors.RevisionChanged, match=r"answers as m@r1 \(n\), but revision r0 is pinned"):
        World().run(core(revision="r0", on_error="none").score("p", "r"))


def test_a_pin_that_the_server_does_not_know_is_a_changed_revision() -> None:
    world = World(lambda request, body: refusal(404, "unknown_model"))
    with pytest.raises(errors.RevisionChanged, match="the pinned revision is not served"):
        world.run(core(model="m", revision="r0", on_error="none").score("p", "r"))
    with pytest.raises(errors.NotFound):
        world.run(core(model="m", on_error="none").score("p", "r"))


def test_info_is_of_the_model_that_is_asked_for() -> None:
    other = {"model": "other", "revision": "o1", "numerics": "n"}
    limits = {"max_items": 1, "max_body_bytes": 1}
    world = World(lambda request, body: ok({**IDENTITY, "limits": limits, "models": [IDENTITY, other]}))
    assert world.run(core(model="other").info()).identity.revision == "o1"
    assert world.run(core().info()).identity.revision == world.run(core(model="m").info()).identity.revision == "r1"


def test_an_invalid_answer_names_where_it_came_from() -> None:
    world = World(lambda request, body: Reply(200, {"x-request-id": "q"}, b"oops"))
    with pytest.raises(errors.ResponseInvalid, match=r"http://h/base/score: .*not JSON.* \[request q\]") as caught:
        world.run(core(on_error="none").score("p", "r"))
    assert caught.value.request_id == "q"


def test_ranks_are_sorted_and_stable_and_leave_out_what_has_no_score() -> None:
    responses = ["aa", "bad", "bbbb", "cc", "d"]
    ranking = World().run(core(on_error="none").rank("p", responses, None))
    assert ranking.order == [2, 0, 3, 4] and ranking.best.index == 2
    assert [failed.index for failed in ranking.failed] == [1]
    assert World().run(core(on_error="none").rank("p", responses, 2)).order == [2, 0]
    with pytest.raises(errors.ItemFailed, match="too_long"):
        World().run(core().rank("p", responses, None))
    with pytest.raises(errors.InvalidInput, match="top_n"):
        World().run(core().rank("p", responses, 0))
    with pytest.raises(errors.ItemFailed, match="none is the best"):
        _ = World().run(core(on_error="none").rank("p", ["bad"], None)).best


def test_ready_waits_as_long_as_the_server_says_no_and_says_what_for(caplog: pytest.LogCaptureFixture) -> None:
    replies = iter([Failure("connect", "refused"), *[refusal(503, "warming")] * 3, ok({})])
    world = World(lambda request, body: next(replies))
    world.run(core().wait_until_ready(10.0))
    assert world.slept == [0.1, 0.2, 0.4, 0.8] and [path for path, _, _ in world.sent] == ["/readyz"] * 5
    assert [record.message.split(": ", 1)[1][:7] for record in caplog.records] == ["refused", "because"], "each once"


def test_ready_gives_up_in_time_or_at_once() -> None:
    world = World(lambda request, body: refusal(503, "warming"))
    with pytest.raises(errors.TimedOut, match="not ready after .* because"):
        world.run(core().wait_until_ready(5.0))
    assert world.now == pytest.approx(105.0) and max(world.slept) <= 2.0
    with pytest.raises(errors.NotFound):
        World(lambda request, body: refusal(404, "no_route")).run(core().wait_until_ready(None))


def test_a_plan_whose_slot_came_too_late_fails_without_sending() -> None:
    class Crowded(World):
        def _perform(self, step: Any) -> Any:
            self.now += 10.0 if isinstance(step, Gather) else 0.0
            return super()._perform(step)

    world = Crowded()
    with pytest.raises(errors.TimedOut, match="one of the client's 32 slots"):
        world.run(core(timeout=5.0).score("p", "r"))
    assert world.sent == []


def test_a_comparison_is_checked_before_it_is_sent() -> None:
    world = World(lambda request, body: ok({**IDENTITY, "probability": 0.5, "margin": 0.0}))
    assert world.run(core(overlong="error").compare("p", "a", "b")).margin == 0.0
    path, body, _ = world.sent[0]
    assert path == "/compare" and body.pop("deadline_ms") == 600_000
    assert body == {"prompt": "p", "response_a": "a", "response_b": "b", "overlong": "error"}
    with pytest.raises(errors.InvalidInput, match="must be a list of texts"):
        world.run(core().compare("p", "a", None))  # type: ignore[arg-type]
