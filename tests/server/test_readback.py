"""A device that computes by itself, played by one whose scores come when the test says so; all else is real."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from plaudit_model.encode import Encoded
from plaudit_model.packing import group_items
from plaudit_model.readback import readback_of
from plaudit_server import messages, worker_process
from plaudit_server.faults import Fault
from plaudit_server.link import SocketLink
from plaudit_server.messages import Attributes, LoadOrder, Scores
from plaudit_server.worker_process import Scorer, answer_batches


class Device:
    """Runs what it is given in order: at once while it is `swift`, else one thing each time that `step` is called."""

    def __init__(self) -> None:
        self.swift = True
        self.launched: list[Pending] = []
        self.reads: list[Pending] = []

    def __call__(self, scores_NA: torch.Tensor) -> Pending:
        pending = Pending(self, scores_NA.numpy())
        if self.swift:
            pending.done.set()
        self.launched.append(pending)
        return pending

    def step(self) -> None:
        next(one for one in self.launched if not one.done.is_set()).done.set()


class Pending:
    def __init__(self, device: Device, scores: Attributes) -> None:
        self._device, self._scores, self.done = device, scores, threading.Event()

    def landed(self) -> bool:
        return self.done.is_set()

    def wait(self) -> Attributes:
        assert self.done.wait(20)
        self._device.reads.append(self)
        return self._scores


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(worker_process, "readback_of", lambda _: device)
    return device


@contextmanager
def scorer_on(device: Device, directory: Path, armed: tuple[Fault, ...] = ()) -> Iterator[tuple[Scorer, SocketLink]]:
    """A scorer that answers batches in a thread, and the front's end of its link."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)
        order = LoadOrder(str(directory), "cpu", None, None, 1)
        scorer = Scorer(order, armed)  # which scores items of its own
        device.swift = False
        device.launched.clear()
        device.reads.clear()
        thread = threading.Thread(target=answer_batches, args=(SocketLink(theirs), scorer))
        thread.start()
        yield scorer, SocketLink(ours)
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(20)
        assert not thread.is_alive()


def batch(seed: int, n: int = 3) -> list[Encoded]:
    random = np.random.default_rng(seed)
    return [Encoded(random.integers(5, 600, 20 + i, dtype=np.int32), 4) for i in range(n)]


def send(link: SocketLink, items: Sequence[Encoded]) -> None:
    link.send(messages.batch_frame(group_items(items, share=True)))


def receive(link: SocketLink, rows: int = 3) -> Scores:
    frame = link.receive()
    assert frame is not None
    answer = messages.reply(frame, rows)
    assert isinstance(answer, Scores)
    return answer


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def alone(scorer: Scorer, seed: int, n: int = 3) -> bytes:
    """The scores of a batch in the order of its rows, computed without a device of this kind."""
    items = batch(seed, n)
    rows = [index for group in group_items(items, share=True) for index in group.indices]
    return scorer._model.score_encoded(items)[rows].tobytes()


def test_the_next_batch_is_launched_before_the_last_is_read(device: Device, tiny_model_dir: Path) -> None:
    with scorer_on(device, tiny_model_dir) as (scorer, link):
        for seed in (1, 2):
            send(link, batch(seed))
        until(lambda: len(device.launched) == 2)
        assert device.reads == []
        for seed in (3, 4, 5):
            device.step()
            assert receive(link).attributes.tobytes() == alone(scorer, seed - 2)
            send(link, batch(seed))
            until(lambda: len(device.launched) == seed)  # noqa: B023
        for seed in (4, 5):
            device.step()
            assert receive(link).attributes.tobytes() == alone(scorer, seed)


def test_an_answer_does_not_wait_for_another_batch(device: Device, tiny_model_dir: Path) -> None:
    with scorer_on(device, tiny_model_dir) as (scorer, link):
        send(link, batch(1))
        until(lambda: len(device.launched) == 1)
        device.step()
        assert receive(link).attributes.tobytes() == alone(scorer, 1)


def test_time_behind_another_batch_is_not_time_of_computing(device: Device, tiny_model_dir: Path) -> None:
    with scorer_on(device, tiny_model_dir) as (_, link):
        began = time.monotonic()
        for seed in (1, 2):
            send(link, batch(seed))
        until(lambda: len(device.launched) == 2)
        time.sleep(0.05)  # both are under way
        device.step()
        first = receive(link)
        device.step()
        second = receive(link)
        assert first.seconds + second.seconds <= time.monotonic() - began
        assert first.seconds >= 0.05


def test_a_batch_that_finds_no_memory_behind_another_is_computed_when_that_has_gone(
    device: Device, tiny_model_dir: Path
) -> None:
    with scorer_on(device, tiny_model_dir, (Fault("oom_over_tokens", 100),)) as (scorer, link):
        send(link, batch(1))
        send(link, batch(2, n=6))
        until(lambda: len(device.launched) == 1)
        device.step()
        assert receive(link).attributes.tobytes() == alone(scorer, 1)
        parts = receive(link, 6)
        assert parts.token_cap is not None and parts.token_cap <= 100
        assert parts.attributes.tobytes() == alone(scorer, 2, 6)
        send(link, batch(3, n=6))  # larger than the cap: not launched whole again
        assert len(receive(link, 6).attributes) == 6 and len(device.launched) == 1


def test_numbers_are_spoilt_on_command_on_this_way_too(device: Device, tiny_model_dir: Path) -> None:
    with scorer_on(device, tiny_model_dir, (Fault("nan_on_token", 601),)) as (_, link):
        items = batch(1)
        items[1] = replace(items[1], ids=np.array([7, 8, 9, 601], np.int32))
        send(link, items)
        until(lambda: len(device.launched) == 1)
        device.step()
        assert np.isnan(receive(link).attributes[:, 0]).sum() == 1


def test_the_end_of_the_link_ends_it_in_the_middle_of_a_batch(device: Device, tiny_model_dir: Path) -> None:
    with scorer_on(device, tiny_model_dir) as (_, link):
        send(link, batch(1))
        until(lambda: len(device.launched) == 1)
    assert device.reads == []


def test_where_the_forward_has_computed_when_it_returns_nothing_is_read_back() -> None:
    assert readback_of("cpu") is None
    assert readback_of("cuda:1") is not None
