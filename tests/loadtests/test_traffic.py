"""Traffic: reproducible, of the lengths it says, with prompts that come again."""

from __future__ import annotations

import math
import statistics
from itertools import islice
from random import Random

import pytest
from traffic import Lengths, Rollouts, TrafficSettings, finish_times, rollouts

SETTINGS = TrafficSettings(pool=5, repeat_share=0.5)


def stream(user: int, n: int, count: int, settings: TrafficSettings = SETTINGS) -> list[Rollouts]:
    return list(islice(rollouts(settings, user, n), count))


def test_lengths_have_the_median_and_the_spread_they_are_given() -> None:
    rng = Random(0)
    counts = [Lengths(52.0, 1.13, 10_000).draw(rng) for _ in range(4000)]
    logs = [math.log(count) for count in counts]
    assert statistics.median(counts) == pytest.approx(52, rel=0.1)
    assert statistics.stdev(logs) == pytest.approx(1.13, rel=0.05)


def test_lengths_stay_in_their_limits() -> None:
    rng = Random(0)
    counts = [Lengths(2.0, 2.0, 7).draw(rng) for _ in range(500)]
    assert (min(counts), max(counts)) == (1, 7)


def test_texts_have_as_many_words_as_allowed() -> None:
    settings = TrafficSettings(most_prompt_words=9, most_response_words=4)
    for rollout in stream(0, 3, 50, settings):
        assert 1 <= len(rollout.prompt.split()) <= 9
        assert all(1 <= len(response.split()) <= 4 for response in rollout.responses)


def test_a_stream_is_reproducible_and_users_differ() -> None:
    assert stream(1, 4, 20) == stream(1, 4, 20)
    assert stream(1, 4, 20) != stream(2, 4, 20)


def test_a_prompt_that_recurs_is_the_same_for_every_user_and_number_of_responses() -> None:
    small = {r.key: r for r in stream(1, 2, 60) if r.recurs}
    large = {r.key: r for r in stream(2, 6, 60) if r.recurs}
    assert set(small) == set(large) == {f"pool {i}" for i in range(5)}
    for key, rollout in small.items():
        assert rollout.prompt == large[key].prompt
        assert rollout.responses == large[key].responses[:2]


def test_other_prompts_come_once() -> None:
    keys = [r.key for user in (1, 2) for r in stream(user, 1, 100) if not r.recurs]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_repeats(share: float) -> None:
    assert {r.recurs for r in stream(1, 1, 30, TrafficSettings(repeat_share=share))} == {bool(share)}


def test_longer_responses_finish_later() -> None:
    assert finish_times(["a b c d", "a", ""], words_per_second=2.0) == [2.0, 0.5, 0.0]


@pytest.mark.parametrize("wrong", [{"repeat_share": 1.5}, {"pool": 0}, {"tolerance": -1.0}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="repeat_share must be"):
        TrafficSettings(**wrong)  # type: ignore[arg-type]
