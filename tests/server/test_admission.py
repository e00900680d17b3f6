from __future__ import annotations

from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaudit_server.admission import Backlog, Bounds, Demand, Throughput, admit, item_bytes
from plaudit_server.engine_errors import Overloaded, TooLarge

BOUNDS = Bounds(tokens=1000, bytes=1_000_000, item_tokens=100)
IDLE = Backlog(0, 0, 0)


def demand(items: int = 1, each: int = 50) -> Demand:
    return Demand(items, items * each, each)


@given(st.integers(1, 500), st.floats(1, 1e6) | st.none(), st.floats(0.001, 1e3) | st.none())
def test_an_idle_queue_takes_any_request_that_fits(items: int, rate: float | None, time_left: float | None) -> None:
    request = demand(items)
    assert request.bytes <= BOUNDS.bytes
    admit(request, IDLE, BOUNDS, rate, time_left)


@given(st.integers(0, 3000), st.integers(1, 100))
def test_large_and_small_requests_stand_the_same_chance(waiting: int, items: int) -> None:
    def taken(request: Demand) -> bool:
        try:
            admit(request, Backlog(waiting, 0, waiting), BOUNDS, 100.0, None)
        except Overloaded:
            return False
        return True

    assert taken(demand(items)) == taken(demand(1)) == (waiting < BOUNDS.tokens)


def test_what_can_never_fit_is_refused_for_good() -> None:
    with pytest.raises(TooLarge, match="101 tokens"):
        admit(Demand(1, 101, 101), IDLE, BOUNDS, None, None)
    with pytest.raises(TooLarge, match="split it"):
        admit(demand(1000), IDLE, BOUNDS, None, None)


def test_memory_is_bounded_whatever_the_tokens_are() -> None:
    with pytest.raises(Overloaded):
        admit(demand(1), Backlog(10, BOUNDS.bytes - 1, 10), BOUNDS, None, None)


@pytest.mark.parametrize(("own", "clients", "waiting", "taken"), [
    (0, 2, 1000, True), (499, 2, 1900, True), (500, 2, 1000, False),  # its share is half
    (90, 10, 1000, True), (100, 10, 1000, False), (900, 1, 999, True), (0, 1000, 2000, False),
])  # fmt: skip
def test_a_queue_that_others_have_filled_has_room_for_who_has_less_than_a_share(
    own: int, clients: int, waiting: int, taken: bool
) -> None:
    for request in (demand(1), demand(400)):
        with nullcontext() if taken else pytest.raises(Overloaded, match="full"):
            admit(request, Backlog(waiting, 0, own, clients), BOUNDS, 100.0, None)


def test_what_goes_before_in_any_case_is_nobodys_share() -> None:
    admit(demand(), Backlog(999 + 1, 0, 0, 2, first=999), BOUNDS, 100.0, None)
    with pytest.raises(Overloaded, match="full"):
        admit(demand(), Backlog(1000, 0, 0, 2, first=1000), BOUNDS, 100.0, None)


def test_a_deadline_is_held_against_the_turns_until_the_request_is_done() -> None:
    admit(demand(2), Backlog(900, 0, 0, 2), BOUNDS, rate=100.0, time_left=2.1)  # as much of the other's beside it
    with pytest.raises(Overloaded, match="deadline"):
        admit(demand(2), Backlog(900, 0, 0, 2), BOUNDS, rate=100.0, time_left=1.9)
    with pytest.raises(Overloaded, match="deadline"):
        admit(demand(2), Backlog(900, 0, 0, 2, first=100), BOUNDS, rate=100.0, time_left=2.9)


@pytest.mark.parametrize(("rate", "expected"), [(None, 1.0), (100.0, 10.0), (1e9, 0.5), (0.001, 60.0)])
def test_retry_after_is_when_half_of_the_bound_is_free(rate: float | None, expected: float) -> None:
    with pytest.raises(Overloaded) as refused:
        admit(demand(), Backlog(1500, 0, 1500), BOUNDS, rate, None)
    assert refused.value.retry_after == pytest.approx(expected)


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    backlog = Backlog(900, 0, 900)
    admit(demand(2), backlog, BOUNDS, rate=100.0, time_left=10.1)
    with pytest.raises(Overloaded, match="deadline"):
        admit(demand(2), backlog, BOUNDS, rate=100.0, time_left=9.9)


def test_throughput_follows_real_batches() -> None:
    throughput = Throughput(full=500)
    assert throughput.tokens_per_second is None
    throughput.observe(500, 1000, 1.0)
    assert throughput.tokens_per_second == 1000
    for _ in range(50):
        throughput.observe(500, 1000, 0.1)
    assert throughput.tokens_per_second == pytest.approx(10_000, rel=0.01)


def test_the_time_of_a_small_batch_says_nothing_of_the_rate() -> None:
    throughput = Throughput(full=500)
    throughput.observe(499, 499, 1.0)
    assert throughput.tokens_per_second is None


def test_what_an_item_holds_grows_with_its_tokens() -> None:
    assert item_bytes(0) > 0
    assert demand(3, 10).bytes == 3 * item_bytes(10)
