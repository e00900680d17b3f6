"""Load in the three shapes that reward models get, checked while it runs.

    cd loadtests
    locust --headless --host http://127.0.0.1:8000 --users 12 --spawn-rate 12 --run-time 60s \
        --load profiles/cpu.toml [--report results/cpu.csv] [StormUser BatchUser BestOfNUser]

Start it in this folder, or with PYTHONSAFEPATH=1: Locust puts the current directory on `sys.path`, and the
repository's root must not be there.

Every response is checked for length, order, index echo and finite scores, and an item that comes again must get the
same score, whichever shape it comes in (bit-equal unless the profile names a tolerance), and different items different
ones. A wrong answer counts as a failure of its own kind. Exit codes: 0, or 1 if the profile's objectives are missed, 69
if the server is not ready, 78 for an unusable profile.
`PLAUDIT_API_KEY` in the environment is sent as a bearer token.

Users are closed loops: a server that stalls delays the next step of its user, as it delays a trainer.
"""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import gevent.pool  # type: ignore[import-untyped]
import report
from checks import WRONG, ItemsFailed, Ledger, Place, WrongAnswer, checked_scores, identity
from locust import FastHttpUser, constant_pacing, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import WorkerRunner
from locust.stats import RequestStats
from slo import SHAPES, Measured, Profile, ProfileError, read_profile, violations
from traffic import Rollouts, finish_times, rollouts

from plaudit import Client, Identity, PlauditError

logger = logging.getLogger("plaudit.loadtest")
_NUMBER_OF_USER = count()

Part = tuple[Rollouts, int, int]
"""Scores that belong together: of this prompt, from this response on, so many."""


class _Refused(Exception):
    """The server answered with an error status, or not at all (status 0)."""


@cache
def _profile(path: str) -> Profile:
    return read_profile(Path(path))


@cache
def _ledger(tolerance: float) -> Ledger:
    """One per process: scores must agree across users and shapes."""
    return Ledger(tolerance)


class ScoringUser(FastHttpUser):
    """Posts to /score and checks what comes back."""

    abstract = True
    concurrency = 256

    def on_start(self) -> None:
        self.profile = _profile(_options(self.environment).load)
        self.ledger = _ledger(self.profile.traffic.tolerance)
        key = os.environ.get("PLAUDIT_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.rollouts = rollouts(self.profile.traffic, next(_NUMBER_OF_USER), self.samples())

    def samples(self) -> int:
        """How many responses each prompt gets in this shape."""
        raise NotImplementedError

    def pace(self) -> float:
        """Seconds from the start of one step to the start of the next."""
        raise NotImplementedError

    def wait_time(self) -> float:
        return float(constant_pacing(self.pace())(self))

    def post(self, shape: str, body: Mapping[str, Any], places: Sequence[Place], parts: Sequence[Part]) -> None:
        """Post, check, and have Locust count the failure if there is one."""
        body = {**body, "overlong": "truncate_prompt"}
        with self.client.post("/score", json=body, name=shape, headers=self.headers, catch_response=True) as response:
            try:
                self._check(response, places, parts)
            except (WrongAnswer, ItemsFailed, _Refused) as error:
                response.failure(str(error))

    def _check(self, response: Any, places: Sequence[Place], parts: Sequence[Part]) -> None:
        if response.status_code != 200:
            raise _Refused(f"status {response.status_code}")
        try:
            answer = response.json()
        except ValueError as error:
            raise WrongAnswer("the body is not JSON") from error
        scores = checked_scores(answer, places)
        who, at = identity(answer), 0
        for rollout, first, n in parts:
            self.ledger.look(who, rollout.key, scores[at : at + n], first)
            if rollout.recurs:
                self.ledger.check(who, rollout.key, scores[at : at + n], first)
            at += n


class StormUser(ScoringUser):
    """A rollout worker: each sample is posted alone as soon as it is complete."""

    def samples(self) -> int:
        return self.profile.storm.samples

    def pace(self) -> float:
        return self.profile.storm.step_seconds

    @task
    def step(self) -> None:
        rollout = next(self.rollouts)
        pool = gevent.pool.Pool()
        for j, seconds in enumerate(finish_times(rollout.responses, self.profile.storm.words_per_second)):
            pool.start(gevent.Greenlet(self._finish, rollout, j, seconds))
        pool.join(raise_error=True)

    def _finish(self, rollout: Rollouts, j: int, seconds: float) -> None:
        gevent.sleep(seconds)
        body = {"prompt": rollout.prompt, "response": rollout.responses[j]}
        self.post("storm", body, [(0, None)], [(rollout, j, 1)])


class BatchUser(ScoringUser):
    """A trainer's rank: one long list per step."""

    def samples(self) -> int:
        return self.profile.batch.samples

    def pace(self) -> float:
        return self.profile.batch.step_seconds

    @task
    def step(self) -> None:
        size, samples = self.profile.batch.items, self.profile.batch.samples
        parts = [(next(self.rollouts), 0, min(samples, size - at)) for at in range(0, size, samples)]
        items = [{"prompt": r.prompt, "response": text} for r, _, n in parts for text in r.responses[:n]]
        self.post("batch", {"items": items}, [(i, None) for i in range(size)], parts)


class BestOfNUser(ScoringUser):
    """A best-of-n script: one prompt, n responses."""

    def samples(self) -> int:
        return self.profile.best_of_n.responses

    def pace(self) -> float:
        return self.profile.best_of_n.step_seconds

    @task
    def step(self) -> None:
        rollout, n = next(self.rollouts), self.samples()
        body = {"prompt": rollout.prompt, "responses": rollout.responses}
        self.post("best_of_n", body, [(0, j) for j in range(n)], [(rollout, 0, n)])


def _options(environment: Environment) -> Namespace:
    options = environment.parsed_options
    assert isinstance(options, Namespace)  # only a library user of Locust runs without a command line
    return options


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def _add_options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--load", default="profiles/smoke.toml", help="traffic and objectives, a TOML file")
    parser.add_argument("--report", default="", help="CSV file to append to; a Markdown page is written beside it")
    parser.add_argument("--commit", default="unknown", help="the commit under test, for the report")
    parser.add_argument("--hardware", default=report.hardware(), help="the machine under test, for the report")


@events.init.add_listener  # type: ignore[untyped-decorator]
def _start(environment: Environment, **_: object) -> None:
    """Stop before the load, not during it, if the profile cannot be used or the server is not ready."""
    if isinstance(environment.runner, WorkerRunner):
        return
    try:
        profile = _profile(_options(environment).load)
        with Client(environment.host or "") as client:
            client.wait_until_ready(timeout=60)
            who = client.info().identity
    except (ProfileError, PlauditError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    logger.info("%s@%s (%s), profile %s", who.model, who.revision, who.numerics, profile.name)
    environment.events.quitting.add_listener(  # type: ignore[no-untyped-call]
        partial(_finish, profile=profile, who=who)
    )


def _finish(environment: Environment, profile: Profile, who: Identity, **_: object) -> None:
    """Judge the run, write the report, and set the exit code."""
    total = environment.stats.total
    seconds = (total.last_request_timestamp or 0.0) - total.start_time
    measured = [_measured(environment.stats, profile, shape) for shape in SHAPES]
    missed = violations(profile.slo, measured, seconds)
    environment.process_exit_code = 1 if missed else 0
    options = _options(environment)
    run = report.Run(
        datetime.now(UTC).isoformat(timespec="seconds"), options.commit, options.hardware, profile.name,
        options.num_users or 1, seconds, who.model, who.revision, who.numerics,
    )  # fmt: skip
    page = report.markdown(run, measured, missed)
    sys.stdout.write(page)
    if options.report:
        report.append_csv(Path(options.report), report.rows(run, measured))
        Path(options.report).with_suffix(".md").write_text(page, encoding="utf-8")


def _measured(stats: RequestStats, profile: Profile, shape: str) -> Measured:
    entry = stats.get(shape, "POST")
    errors = [error for error in stats.errors.values() if error.name == shape]
    p20, p50, p80, p99 = (
        float(entry.get_response_time_percentile(share)) if entry.num_requests else 0.0
        for share in (0.2, 0.5, 0.8, 0.99)
    )
    return Measured(
        shape=shape, requests=entry.num_requests, failures=entry.num_failures,
        wrong=sum(error.occurrences for error in errors if WRONG in str(error.error)),
        items=(entry.num_requests - entry.num_failures) * profile.items_per_request(shape),
        p20_ms=p20, p50_ms=p50, p80_ms=p80, p99_ms=p99,
    )  # fmt: skip
