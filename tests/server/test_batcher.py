from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit_model.packing import pack
from plaudit_server.batcher import INTERACTIVE_TURNS, Batcher, BatchPolicy
from plaudit_server.domain import Priority, Work
from plaudit_server.waiting import Batch, Job

POISON = 99


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def prompt(number: int, length: int = 20) -> list[int]:
    return [7] * 4 + [number] * (length - 4)


def job(
    ids: list[int], *, now: float = 0.0, prompt_tokens: int = 0, priority: Priority = "batch",
    deadline: float | None = None, size: int = 0, client: str = "",
) -> Job:  # fmt: skip
    work = Work(tokens(*ids), prompt_tokens)
    return Job(work, work.ids.tobytes(), priority, now, deadline, size, client)


def cost(batch: Batch) -> int:
    return sum(group.tokens for group in batch.groups())


def keys(batch: Batch) -> list[bytes]:
    return [entry.key for entry in batch.entries]


def batcher(share: bool = True, **policy: float) -> Batcher:
    return Batcher(BatchPolicy(**policy), share=share)  # type: ignore[arg-type]


def fill(queue: Batcher, *jobs: Job) -> tuple[Job, ...]:
    for item in jobs:
        queue.add(item)
    return jobs


def settle(queue: Batcher, batch: Batch) -> list[Job]:
    return [job for entry in batch.entries for job in queue.answered(entry)]


# A day in the life of a queue: arrivals, cancellations, time, workers that take and answer batches and may die.

_classes = st.sampled_from(["interactive", "batch"])
_arrival = st.tuples(
    st.just("add"), st.integers(0, 3), st.lists(st.integers(0, 3), max_size=6), _classes,
    st.sampled_from([None, None, 0.01, 0.1]),
)  # fmt: skip
_events = st.lists(
    st.one_of(
        _arrival, _arrival, st.tuples(st.just("cancel"), st.integers(0, 40)),
        st.tuples(st.just("wait"), st.floats(0, 0.05)), st.tuples(st.just("take")), st.tuples(st.just("answer")),
        st.tuples(st.just("die")),
    ),
    max_size=60,
)  # fmt: skip


@dataclass
class Day:
    """What happened: jobs by fate, and every batch that was given to a worker."""

    jobs: list[Job] = field(default_factory=list)
    fates: list[tuple[Job, str]] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)

    def fate(self, job: Job) -> list[str]:
        return [what for who, what in self.fates if who is job]


def live(events: list[tuple], queue: Batcher, budget: int, workers: int = 1) -> Day:
    """Play the events, then let the workers finish. Checks every batch when it is taken."""
    day, now = Day(), 0.0
    running: list[Batch] = []
    cancelled: set[Job] = set()

    def take(now: float) -> None:
        batch = queue.next_batch(now, "idle")
        if batch is not None:
            day.batches.append(batch)
            running.append(batch)
            assert cost(batch) <= budget or len(batch.entries) == 1
            assert cost(batch) == pack(batch.groups()).tokens
            assert not any(job in cancelled for entry in batch.entries for job in entry.jobs)
            assert all(entry.jobs for entry in batch.entries)
            assert all(entry.state == "running" for batch in running for entry in batch.entries)

    for event in events:
        day.fates += [(job, "expired") for job, _ in queue.expire(now)]
        match event:
            case ("add", number, response, priority, ttl):
                ids = [*prompt(number), *response, 1]
                day.jobs.append(job(ids, now=now, prompt_tokens=20, priority=priority, deadline=ttl and now + ttl))
                queue.add(day.jobs[-1])
            case ("cancel", number) if number < len(day.jobs) and not day.fate(day.jobs[number]):
                queue.discard(day.jobs[number])
                cancelled.add(day.jobs[number])
                day.fates.append((day.jobs[number], "cancelled"))
            case ("wait", seconds):
                now += seconds
            case ("take",) if len(running) < workers:
                take(now)
            case ("answer",) if running:
                day.fates += [(job, "answered") for job in settle(queue, running.pop(0))]
            case ("die",) if running:
                culprit = queue.lost(running.pop())
                day.fates += [(job, "crashed") for job in (queue.answered(culprit) if culprit else ())]
    while running or not queue.empty:
        day.fates += [(job, "answered") for job in (settle(queue, running.pop()) if running else ())]
        now += queue.wait(now, "idle") or 0.0
        day.fates += [(job, "expired") for job, _ in queue.expire(now)]
        take(now)
    return day


@settings(max_examples=300)
@given(_events, st.sampled_from([40, 64, 4096]), st.booleans(), st.sampled_from([1, 3]))
def test_every_job_meets_exactly_one_fate(events: list[tuple], budget: int, share: bool, workers: int) -> None:
    queue = batcher(share=share, token_budget=budget)
    day = live(events, queue, budget, workers)
    assert [day.fate(job) for job in day.jobs if len(day.fate(job)) != 1] == []
    assert queue.queued_tokens("interactive") == queue.queued_tokens("batch") == 0
    assert queue.empty
    assert queue.wait(1e9, "idle") is None


@settings(max_examples=200)
@given(_events)
def test_a_sequence_is_computed_once_for_all_who_wait(events: list[tuple]) -> None:
    calm = [event for event in events if event[0] not in ("die", "cancel")]
    day = live(calm, batcher(), 4096)
    computed = Counter(key for batch in day.batches for key in keys(batch))
    answers = Counter(job.key for job in day.jobs if day.fate(job) == ["answered"])
    arrivals = Counter(job.key for job in day.jobs)
    for key, times in computed.items():
        assert times <= arrivals[key]
    assert set(answers) <= set(computed)


def test_duplicates_join_whether_waiting_or_running() -> None:
    queue = batcher(settle=0.0)
    first, second, third = job([1, 2, 3]), job([1, 2, 3]), job([1, 2, 3])
    assert not queue.add(first)
    assert queue.add(second)
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None and len(batch.entries) == 1
    assert queue.add(third)
    assert queue.next_batch(2.0, "idle") is None
    assert settle(queue, batch) == [first, second, third]
    assert queue.empty


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30), _classes), min_size=1, max_size=40))
def test_the_oldest_of_its_class_leads_and_neither_class_starves(arrivals: list[tuple[int, int, Priority]]) -> None:
    queue = batcher(token_budget=64)
    jobs = fill(queue, *(
        job([*prompt(number), *range(length), index], now=float(index), priority=priority)
        for index, (number, length, priority) in enumerate(arrivals)
    ))  # fmt: skip
    waiting = {item.key: item for item in jobs}
    led_in_a_row = 0
    while (batch := queue.next_batch(1e9, "idle")) is not None:
        leader = waiting[keys(batch)[0]]
        assert leader.arrived == min(item.arrived for item in waiting.values() if item.priority == leader.priority)
        both = len({item.priority for item in waiting.values()}) == 2
        led_in_a_row = led_in_a_row + 1 if both and leader.priority == "interactive" else 0
        assert led_in_a_row <= INTERACTIVE_TURNS
        assert not both or leader.priority == "interactive" or led_in_a_row == 0
        for key in keys(batch):
            del waiting[key]
        settle(queue, batch)
    assert not waiting


def test_nobody_waits_for_the_whole_of_long_requests_and_their_oldest_is_never_far_from_its_turn() -> None:
    queue, rows = batcher(token_budget=100), 40  # a batch holds ten sequences
    long = [
        fill(queue, *(job([10 + request] * 9 + [row], size=10 * rows) for row in range(rows))) for request in range(5)
    ]
    waiting = [item for request in long for item in request]
    waited: Counter[bytes] = Counter()
    led_by_others, batches = 0, 0
    for time in range(100):
        short = job([200 + time] * 10, now=float(time), size=10)
        if time % 3 == 0:
            waiting += fill(queue, short)
        batch = queue.next_batch(1e9, "idle")
        if batch is None:
            continue
        oldest = waiting[0].key
        led_by_others = 0 if keys(batch)[0] == oldest else led_by_others + 1
        assert led_by_others <= 1
        done = {item.key for item in settle(queue, batch)}
        waiting = [item for item in waiting if item.key not in done]
        waited.update(item.key for item in waiting)
        batches += 1
    assert not waiting and batches >= 5 * rows / 10
    assert max(waited[job([200 + time] * 10).key] for time in range(100)) <= 1
    assert waited[long[-1][-1].key] <= 2 * len(long) * rows / 10


@pytest.mark.parametrize(("sizes", "order"), [
    ([40] * 8, [0, 1, 2, 3, 4, 5, 6, 7]),  # of one length: whoever came first is done first
    ([80] * 6 + [20] * 2, [0, 6, 1, 7, 2, 3, 4, 5]),
])  # fmt: skip
def test_requests_of_one_length_are_served_in_order_and_shorter_ones_in_between(
    sizes: list[int], order: list[int]
) -> None:
    queue = batcher(token_budget=10)
    fill(queue, *(job([1] * 9 + [row], size=size) for row, size in enumerate(sizes)))
    assert led(queue) == order


def test_an_item_that_a_shorter_request_asks_for_too_comes_as_early_as_there() -> None:
    queue = batcher(token_budget=10)
    fill(queue, *(job([1] * 9 + [row], size=40) for row in range(4)), job([1] * 9 + [3], size=10))
    assert led(queue) == [0, 3, 1, 2]


def test_a_storm_of_one_client_does_not_delay_another_whatever_the_lengths() -> None:
    for length in (20, 30, 50):  # shorter than the storm's, as long, longer
        queue = batcher(token_budget=100)
        fill(queue, *(job([30] * 28 + [1 + row // 90, row % 90], size=30, client="storm") for row in range(4000)))
        [single] = fill(queue, job([50] * length, size=length, client="other"))
        taken = [queue.next_batch(1e9, "idle") for _ in range(2)]  # the storm's prompt has filled the first
        assert any(single.key in keys(batch) for batch in taken if batch)


@pytest.mark.parametrize(("clients", "order"), [
    ("aaaabbc", [0, 4, 6, 1, 5, 2, 3]), ("abcabc", [0, 1, 2, 3, 4, 5]), ("aaa", [0, 1, 2]),
])  # fmt: skip
def test_clients_lead_in_turns(clients: str, order: list[int]) -> None:
    queue = batcher(token_budget=10)
    fill(queue, *(job([1] * 9 + [row], size=10, client=client) for row, client in enumerate(clients)))
    assert led(queue) == order


def test_who_comes_anew_waits_behind_those_who_wait_and_not_behind_all_their_work() -> None:
    queue = batcher(token_budget=10)
    fill(queue, *(job([1] * 9 + [row], size=10, client="ab"[row % 2]) for row in range(8)))
    first = queue.next_batch(1e9, "idle")
    assert first is not None and first.entries[0].ids[-1] == 0
    fill(queue, job([1] * 9 + [50], size=10, client="c"))
    assert led(queue)[:4] == [1, 2, 50, 3]


def test_a_batch_is_divided_among_clients_by_tokens() -> None:
    queue = batcher(token_budget=120, look_ahead=0)
    fill(queue, *(job([100 + row] * 20, client="long") for row in range(20)))
    fill(queue, *(job([200 + row] * 5, client="short") for row in range(40)))
    batch = queue.next_batch(1e9, "idle")
    assert batch is not None
    given = Counter(entry.client for entry in batch.entries for _ in entry.ids)
    assert given == {"long": 60, "short": 60}


def test_a_client_leads_with_its_oldest_every_second_time_whoever_leads_in_between() -> None:
    queue = batcher(token_budget=10)
    fill(queue, *(job([1] * 9 + [row], size=10, client="a") for row in range(6)))
    fill(queue, job([1] * 9 + [50], size=90, client="b"), job([1] * 9 + [51], size=80, client="b"))
    fill(queue, *(job([1] * 9 + [60 + row], size=10, client="b") for row in range(6)))
    assert led(queue)[1::2][:4] == [50, 60, 51, 61]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.booleans()), min_size=1, max_size=60))
def test_the_oldest_of_a_client_leads_after_two_turns_of_each_whoever_comes(
    arrivals: list[tuple[str, int, bool]],
) -> None:
    queue, waited = batcher(token_budget=10), Counter[str]()
    waiting: list[Job] = []
    for row, (client, size, take) in enumerate([*arrivals, *[("", 0, True)] * 200]):
        if client:
            waiting += fill(queue, job([1] * 9 + [row], now=float(row), size=10 * size, client=client))
        if not take or (batch := queue.next_batch(1e9, "idle")) is None:
            continue
        [entry] = batch.entries
        oldest = {client: next((item.key for item in waiting if item.client == client), b"") for client in "abc"}
        for client, key in oldest.items():
            waited[client] = waited[client] + 1 if key not in (b"", entry.key) else 0
            assert waited[client] < 2 * 3
        settle(queue, batch)
        waiting = [item for item in waiting if item.key != entry.key]
    assert not waiting and queue.empty


def test_what_another_client_asks_for_too_comes_in_the_sooner_turn() -> None:
    queue = batcher(token_budget=10)
    fill(queue, *(job([1] * 9 + [row], size=10, client="a") for row in range(6)))
    fill(queue, job([1] * 9 + [5], size=10, client="b"))
    assert led(queue) == [0, 5, 1, 2, 3, 4]
    assert queue.empty and queue.queued_tokens("batch") == 0


def test_what_is_the_next_of_its_client_keeps_its_turn_whoever_asks_for_it_too() -> None:
    queue = batcher(token_budget=10)
    fill(queue, *(job([1] * 9 + [row], size=10, client=client) for row, client in enumerate("abbccdd")))
    for late in "efgh":  # each would move it behind all who wait
        fill(queue, job([1] * 9 + [0], size=10, client=late))
    assert led(queue) == [0, 1, 3, 5, 2, 4, 6]


def test_what_was_put_back_is_in_front_of_other_clients_too() -> None:
    queue = batcher(token_budget=10)
    fill(queue, *(job([1] * 9 + [row], size=10, client="ab"[row % 2]) for row in range(4)))
    first = queue.next_batch(1e9, "idle")
    assert first is not None
    queue.put_back(first)
    assert led(queue) == [0, 1, 2, 3]


def led(queue: Batcher) -> list[int]:
    """The last token of each batch's leader."""
    found = []
    while batch := queue.next_batch(1e9, "idle"):
        found.append(int(batch.entries[0].ids[-1]))
        settle(queue, batch)
    return found


def test_interactive_goes_first() -> None:
    queue = batcher(token_budget=32)
    fill(queue, job([*prompt(1), 1]), job([*prompt(2), 1], priority="interactive"))
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None and batch.entries[0].ids[4] == 2


def test_the_batch_class_has_its_turn_under_constant_interactive_load() -> None:
    queue = batcher(token_budget=64)
    fill(queue, *(job([index] * 60, priority="interactive") for index in range(10)))
    fill(queue, *(job([50 + index] * 60) for index in range(2)))
    leaders = []
    while (batch := queue.next_batch(1e9, "idle")) is not None:
        leaders.append(batch.entries[0].priority[0])
        settle(queue, batch)
    assert "".join(leaders) == "iiiibiiiibii"


def test_an_interactive_duplicate_makes_a_waiting_sequence_urgent() -> None:
    queue = batcher(token_budget=32)
    fill(queue, job([*prompt(1), 1]), job([*prompt(2), 1]), job([*prompt(2), 1], priority="interactive"))
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None and batch.entries[0].ids[4] == 2
    assert queue.queued_tokens("batch") == 21 and queue.queued_tokens("interactive") == 0


@pytest.mark.parametrize("boundary", [0, 200])
def test_samples_of_one_prompt_from_many_requests_share_it(boundary: int) -> None:
    """With or without a declared boundary, and with an unrelated prompt in between."""
    queue = batcher()
    for index in range(16):
        response = [index + 10] * 25
        fill(queue, *(job([*prompt(number, 200), *response], prompt_tokens=boundary) for number in (1, 2)))
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None
    assert [len(group.prefix) for group in batch.groups()] == [200, 200]
    assert cost(batch) == 2 * (200 + 16 * 25)


def test_a_common_system_prompt_does_not_tear_families_apart() -> None:
    queue = batcher()
    system = list(range(1000, 1030))
    fill(queue, job([*system, *[5] * 300, 1]))
    fill(queue, *(job([*system, *[number] * 300, index]) for number in (6, 7) for index in range(6)))
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None
    assert sorted(len(group.prefix) for group in batch.groups()) == [0, 330, 330]


def test_a_distant_relative_does_not_join_a_close_family() -> None:
    queue = batcher()
    system = list(range(1000, 1030))
    fill(queue, *(job([*system, *[6] * 300, index]) for index in range(6)), job([*system, *[7] * 300]))
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None
    assert [len(group.prefix) for group in batch.groups()] == [330, 0]


def test_responses_that_begin_alike_stay_one_family() -> None:
    queue = batcher()
    fill(queue, *(job([*prompt(1, 300), *[50 + index % 2] * 8, index]) for index in range(8)))
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None and [len(group.prefix) for group in batch.groups()] == [300]


def test_steps_of_one_answer_share_their_common_part() -> None:
    """Each sequence is a prefix of the next, as the steps of a process are."""
    queue = batcher()
    fill(queue, *(job(list(range(1000, 1100 + 20 * step))) for step in range(6)))
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None and len(batch.families) == 1
    assert cost(batch) == 99 + sum(1 + 20 * step for step in range(6))


def test_a_model_that_cannot_share_never_does() -> None:
    queue = batcher(share=False)
    fill(queue, *(job([*prompt(1, 100), index]) for index in range(4)))
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None
    assert [len(group.prefix) for group in batch.groups()] == [0] * 4


def test_a_lone_item_waits_no_longer_than_it_takes_to_settle() -> None:
    queue = batcher(settle=0.003, max_wait=0.012)
    queue.add(job([1, 2], now=5.0))
    assert queue.next_batch(5.0, "idle") is None
    assert queue.wait(5.0, "idle") == pytest.approx(0.003)
    assert queue.next_batch(5.0031, "idle") is not None


def lone_items(queue: Batcher, count: int) -> float:
    """Unrelated items, each 10 ms after the last was answered; how long the last of them was kept waiting."""
    waited = 0.0
    for index in range(count):
        now = 100.0 + index / 100
        queue.add(job([index + 10] * 20, now=now))
        waited = queue.wait(now, "idle") or 0.0
        batch = queue.next_batch(now + waited, "idle")
        assert batch is not None
        settle(queue, batch)
    return waited


def test_lone_items_are_not_kept_waiting_once_nobody_ever_came() -> None:
    queue = batcher(settle=0.003)
    assert lone_items(queue, 8) == pytest.approx(0.003)
    assert lone_items(queue, 1) == 0.0


def test_company_in_flight_ends_that_habit_and_a_client_that_asks_one_by_one_does_not() -> None:
    queue = batcher(settle=0.003)
    lone_items(queue, 20)
    for index in range(3):  # each asked once the last was answered
        now = 200.0 + index / 1000
        queue.add(job([*prompt(1), index], now=now))
        batch = queue.next_batch(now, "idle")
        assert batch is not None
        if index < 2:
            settle(queue, batch)
    queue.add(job([*prompt(1), 9], now=200.0025))  # the third is still being computed
    assert queue.wait(200.0025, "idle") == pytest.approx(0.003)
    assert (late := queue.next_batch(200.1, "idle")) is not None
    settle(queue, late)
    settle(queue, batch)


def test_lone_items_among_storms_are_kept_waiting() -> None:
    queue = batcher(settle=0.003)
    storms = [[*prompt(1), index] for index in range(2)]
    fill(queue, *(job(ids, now=95.0) for ids in storms))
    assert (batch := queue.next_batch(95.1, "idle")) is not None
    settle(queue, batch)
    assert lone_items(queue, 20) == pytest.approx(0.003)  # from 100.0 on
    queue.add(job([9] * 20, now=105.1))
    assert queue.wait(105.1, "idle") == 0.0


@pytest.mark.parametrize("share", [True, False])
def test_where_prompts_cannot_be_shared_nothing_is_company(share: bool) -> None:
    queue = batcher(share=share, settle=0.003)
    for index in range(10):
        now = 10.0 + index
        fill(queue, job([*prompt(1), index], now=now), job([*prompt(1), index + 50], now=now + 0.001))
        waited = queue.wait(now + 0.001, "idle")
        assert (batch := queue.next_batch(now + 1, "idle")) is not None
        settle(queue, batch)
    assert waited == (pytest.approx(0.003) if share else 0.0)


def opening(ids: list[list[int]]) -> float:
    """When the first batch is formed, if one of `ids` arrives every 2 ms from 5.0 on."""
    queue = batcher(settle=0.003, max_wait=0.012)
    for index, sequence in enumerate(ids):
        now = 5.0 + 0.002 * index
        queue.add(job(sequence, now=now))
        wait = queue.wait(now, "idle")
        if wait is not None and wait < 0.002:
            return now + wait
    raise AssertionError("the window never closed")


def test_samples_of_one_prompt_hold_the_window_open_up_to_max_wait() -> None:
    assert opening([[*prompt(1), index] for index in range(20)]) == pytest.approx(5.012)


def test_unrelated_items_do_not_hold_the_window_open() -> None:
    assert opening([[index] * 20 for index in range(20)]) == pytest.approx(5.003)


def test_what_arrived_while_the_worker_was_busy_starts_at_once() -> None:
    queue = batcher(settle=0.003, max_wait=0.012)
    fill(queue, *(job([index] * 20, now=5.0 + 0.001 * index) for index in range(5)))
    assert queue.next_batch(5.004, "none") is None
    assert queue.next_batch(5.004, "idle") is not None


def test_a_full_batch_does_not_wait() -> None:
    queue = batcher(token_budget=64)
    fill(queue, *(job([index] * 32) for index in range(2)))
    assert queue.wait(0.0, "idle") == 0.0
    assert queue.next_batch(0.0, "idle") is not None


def test_only_a_full_batch_is_sent_ahead() -> None:
    queue = batcher(token_budget=64)
    queue.add(job([1] * 32))
    assert queue.next_batch(1e9, "ahead") is None
    assert queue.wait(1e9, "ahead") is None
    queue.add(job([2] * 32))
    assert queue.next_batch(0.0, "none") is None
    assert queue.next_batch(0.0, "ahead") is not None


@pytest.mark.parametrize("gap", [0.0002, 0.001, 0.0025])
def test_a_storm_of_single_requests_costs_little_more_than_one_grouped_call(gap: float) -> None:
    """16 samples of a 500-token prompt in 16 requests, an idle worker that computes 20,000 tokens a second."""
    queue, arrivals = batcher(), [gap * index for index in range(16)]
    samples = [[*prompt(1, 500), *[index + 10] * 50] for index in range(16)]
    now, free_at, computed, batch = 0.0, 0.0, 0, None
    while samples or not queue.empty:
        if batch is not None and now >= free_at:
            settle(queue, batch)
            batch = None
        while arrivals and arrivals[0] <= now:
            queue.add(job(samples.pop(0), now=arrivals.pop(0)))
        if batch is None and (batch := queue.next_batch(now, "idle")):
            computed += cost(batch)
            free_at = now + cost(batch) / 20_000
        now += 0.0001
    assert computed <= 1.3 * (500 + 16 * 50)


def test_cancelled_before_it_runs_is_not_computed() -> None:
    queue = batcher()
    gone, kept = fill(queue, job([1, 2]), job([3, 4]))
    queue.discard(gone)
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None and keys(batch) == [kept.key]


def test_a_deadline_is_an_event() -> None:
    queue = batcher()
    late, running = job([1, 2], deadline=2.0), job([3, 4], deadline=3.0)
    queue.add(running)
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None
    queue.add(late)
    assert queue.wait(1.0, "none") == 1.0
    assert queue.expire(1.9) == []
    assert queue.expire(2.0) == [(late, False)]
    assert queue.expire(3.0) == [(running, True)]
    assert settle(queue, batch) == []
    assert queue.empty


@settings(max_examples=150)
@given(st.integers(1, 40), st.sets(st.integers(0, 39), max_size=3), st.integers(0, 3))
def test_what_kills_the_worker_is_found_and_its_neighbours_are_scored(n: int, poisoned: set[int], prompts: int) -> None:
    queue = batcher()
    jobs = fill(queue, *(
        job([*prompt(index % (prompts + 1)), index + 100, *([POISON] if index in poisoned else [])], prompt_tokens=20)
        for index in range(n)
    ))  # fmt: skip
    scored, convicted, deaths = set(), set(), 0
    while (batch := queue.next_batch(1e9, "idle")) is not None:
        assert cost(batch) == pack(batch.groups()).tokens
        if any(POISON in entry.ids for entry in batch.entries):
            deaths += 1
            culprit = queue.lost(batch)
            convicted |= set(queue.answered(culprit)) if culprit else set()
        else:
            scored |= set(settle(queue, batch))
    poison = {item for item in jobs if POISON in item.work.ids}
    assert convicted == poison
    assert scored == set(jobs) - poison
    assert queue.empty
    assert deaths <= len(poison) * (2 + int(np.ceil(np.log2(n))))


def test_one_loss_convicts_nobody() -> None:
    queue = batcher()
    only = job([1, 2, 3])
    queue.add(only)
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None and queue.lost(batch) is None
    again = queue.next_batch(1.0, "idle")
    assert again is not None and again.suspect and settle(queue, again) == [only]


def test_a_batch_that_raises_is_halved_at_once() -> None:
    queue = batcher()
    fill(queue, *(job([index, 1]) for index in range(4)))
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None and queue.failed(batch) is None
    sizes = []
    while (half := queue.next_batch(1.0, "idle")) is not None:
        sizes.append(len(half.entries))
        settle(queue, half)
    assert sizes == [2, 2]


def test_what_has_ended_two_workers_is_kept_from_the_last_one() -> None:
    queue = batcher()
    fill(queue, *(job([*prompt(1), n]) for n in range(4)))
    for _ in range(2):
        batch = queue.next_batch(1.0, "spared")
        assert batch is not None and len(batch.entries) == 4
        assert queue.lost(batch) is None
    assert (queue.next_batch(1.0, "spared"), queue.wait(1.0, "spared")) == (None, None)
    fill(queue, job([*prompt(2), 1]))
    other = queue.next_batch(9.0, "spared")
    assert other is not None and not other.suspect, "it goes on with what is innocent"
    assert (queue.wait(1.0, "idle"), queue.next_batch(1.0, "ahead")) == (0.0, None)
    for half in (queue.next_batch(1.0, "idle"), queue.next_batch(1.0, "idle")):
        assert half is not None and len(half.entries) == 2 and half.deadly


def test_what_was_lost_once_is_not_held_up_by_what_was_lost_twice() -> None:
    queue = batcher()
    fill(queue, *(job([*prompt(1), n]) for n in range(4)))
    crowd = queue.next_batch(1.0, "idle")
    fill(queue, job([*prompt(2), 1]))
    other = queue.next_batch(9.0, "idle")
    assert crowd is not None and other is not None
    queue.lost(crowd)
    again = queue.next_batch(9.0, "spared")
    assert again is not None and keys(again) == keys(crowd)
    queue.lost(other)
    queue.lost(again)
    taken = queue.next_batch(9.0, "spared")
    assert taken is not None and keys(taken) == keys(other)
    halves = [queue.next_batch(9.0, "idle") for _ in range(2)]
    assert [len(half.entries) for half in halves if half] == [2, 2]


def test_suspects_run_before_anything_else_and_alone() -> None:
    queue = batcher(token_budget=64)
    queue.add(job([1] * 60))
    batch = queue.next_batch(1.0, "idle")
    assert batch is not None
    queue.lost(batch)
    fill(queue, job([2] * 60, priority="interactive"), job([3] * 60, priority="interactive"))
    assert queue.next_batch(1.0, "ahead") is None
    again = queue.next_batch(1.0, "idle")
    assert again is not None and again.suspect and keys(again) == keys(batch)


def test_a_batch_that_was_never_begun_waits_in_front_again() -> None:
    queue = batcher(token_budget=64)
    fill(queue, *(job([index] * 60, now=float(index)) for index in range(3)))
    first, second = queue.next_batch(9.0, "idle"), queue.next_batch(9.0, "ahead")
    assert first is not None and second is not None
    queue.discard(next(iter(second.entries[0].jobs)))
    queue.put_back(second)
    settle(queue, first)
    third = queue.next_batch(9.0, "idle")
    assert third is not None and third.entries[0].ids[0] == 2
    queue.put_back(third)
    assert keys(queue.next_batch(9.0, "idle") or third) == keys(third)


def test_a_sequence_larger_than_the_budget_goes_alone() -> None:
    queue = batcher(token_budget=32)
    fill(queue, job([1] * 100), job([2] * 10), job([3] * 10))
    sizes = []
    while (batch := queue.next_batch(1.0, "idle")) is not None:
        sizes.append([entry.tokens for entry in batch.entries])
        settle(queue, batch)
    assert sizes == [[100], [10, 10]]


def test_what_does_not_fit_is_passed_over_but_leads_the_next_batch() -> None:
    queue = batcher(token_budget=50)
    fill(queue, job([1] * 30), job([2] * 30), job([3] * 20))
    first = queue.next_batch(1.0, "idle")
    second = queue.next_batch(1.0, "idle")
    assert first is not None and [entry.ids[0] for entry in first.entries] == [1, 3]
    assert second is not None and [entry.ids[0] for entry in second.entries] == [2]


def test_a_dear_prompt_is_not_cut_by_the_rest_of_a_batch() -> None:
    queue = batcher(token_budget=1000)
    fill(queue, job([9] * 300), *(job([*prompt(1, 500), *[index] * 60]) for index in range(8)))
    batches = []
    while (batch := queue.next_batch(1.0, "idle")) is not None:
        batches.append(cost(batch))
        settle(queue, batch)
    assert batches == [300, 500 + 8 * 60]


def test_counts_tell_what_waits() -> None:
    queue = batcher()
    fill(queue, job([1] * 5), job([2] * 7, priority="interactive"))
    assert queue.queued_tokens("batch") == 5
    assert queue.queued_tokens("interactive") == 7
    assert not queue.empty
