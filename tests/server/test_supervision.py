from __future__ import annotations

from plaudit_server.supervision import RestartPolicy


def test_delays_double_up_to_thirty_seconds() -> None:
    policy, now, delays = RestartPolicy(), 0.0, []
    for _ in range(9):
        now += 20.0
        delays.append(policy.died(now))
    assert delays == [0, 1, 2, 4, 8, 16, 30, 30, 30]


def test_from_the_fifth_death_within_a_minute_nobody_waits_until_a_batch_was_answered() -> None:
    policy = RestartPolicy()
    assert [policy.died(float(now)) for now in (0, 1, 3, 6, 11)] == [0, 1, 2, 4, None]
    assert [policy.died(float(now)) for now in (41, 71, 101, 1000)] == [None] * 4
    policy.served()
    assert policy.died(2000.0) == 0


def test_deaths_a_minute_apart_are_not_a_crash_loop() -> None:
    policy = RestartPolicy()
    assert None not in [policy.died(now) for now in (0.0, 15.0, 30.0, 45.0, 60.0, 75.0)]


def test_service_brings_the_delay_down_again() -> None:
    policy = RestartPolicy()
    for now in (0.0, 20.0, 40.0):
        policy.died(now)
    policy.served()
    assert policy.died(70.0) == 0.0
