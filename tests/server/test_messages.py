from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaudit_model.packing import Group, pack
from plaudit_server import messages
from plaudit_server.domain import ModelInfo
from plaudit_server.link import Frame, LinkError, from_bytes, to_bytes
from plaudit_server.messages import Failure, LoadOrder, Scores

_ids = st.lists(st.integers(0, 1000), min_size=1, max_size=6).map(lambda ids: np.array(ids, np.int32))


def crossed(frame: Frame) -> Frame:
    data = to_bytes(frame)
    header, _ = struct.unpack_from("<II", data)
    return from_bytes(data[8 : 8 + header], data[8 + header :])


def groups(parts: list[tuple[int, list[np.ndarray]]]) -> list[Group]:
    built, first = [], 0
    for prefix, suffixes in parts:
        n = len(suffixes)
        ids = np.arange(prefix, dtype=np.int32)
        built.append(Group(ids, tuple(suffixes), tuple(range(first, first + n)), tuple(range(n))))
        first += n
    return built


@given(st.lists(st.tuples(st.integers(0, 30), st.lists(_ids, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_groups_arrive_as_they_were_sent(parts: list[tuple[int, list[np.ndarray]]]) -> None:
    sent = groups(parts)
    received = messages.batch_groups(crossed(messages.batch_frame(sent)))
    assert [(g.indices, g.boundaries) for g in received] == [(g.indices, g.boundaries) for g in sent]
    a, b = pack(sent), pack(received)
    assert a.input_ids.tobytes() == b.input_ids.tobytes()
    assert a.segments.tolist() == b.segments.tolist()
    assert a.type_ids.tolist() == b.type_ids.tolist()


@pytest.mark.parametrize("name", ["ids", "prefix_lengths", "group_sizes", "suffix_lengths", "boundaries"])
def test_groups_that_do_not_add_up_are_refused(name: str) -> None:
    frame = messages.batch_frame(groups([(3, [np.arange(2, dtype=np.int32)]), (0, [np.arange(4, dtype=np.int32)])]))
    with pytest.raises(LinkError):
        messages.batch_groups(Frame("batch", {}, {**frame.arrays, name: frame.arrays[name][1:]}))


def test_replies_cross() -> None:
    scores = Scores(np.array([[1.5, np.nan], [np.inf, -0.0]], np.float32), 0.25, ("kernel(rows: i32)",))
    back = messages.reply(crossed(messages.scores_frame(scores)), 2)
    assert isinstance(back, Scores) and (back.seconds, back.late_jit) == (0.25, ("kernel(rows: i32)",))
    assert back.attributes.tobytes() == scores.attributes.tobytes()
    assert (back.unfit, back.token_cap) == ((), None)
    cramped = messages.reply(crossed(messages.scores_frame(Scores(scores.attributes, 0.5, (), (1,), 300))), 2)
    assert isinstance(cramped, Scores) and (cramped.unfit, cramped.token_cap) == ((1,), 300)
    assert messages.reply(crossed(messages.failed_frame(Failure("why"))), 2) == Failure("why")


def test_a_reply_for_another_batch_is_refused() -> None:
    frame = messages.scores_frame(Scores(np.zeros((3, 1), np.float32), 0.0))
    with pytest.raises(LinkError, match="3 numbers"):
        messages.reply(frame, 2)
    with pytest.raises(LinkError, match="expected a scores frame"):
        messages.reply(Frame("ready"), 2)
    arrays = {"attributes": np.zeros(2, np.float32), "unfit": np.zeros(0, np.int32)}
    with pytest.raises(LinkError, match="seconds"):
        messages.reply(Frame("scores", {"columns": 1, "token_cap": None}, arrays), 2)
    with pytest.raises(LinkError, match="a batch of 0 tokens"):
        messages.reply(Frame("scores", {"columns": 1, "token_cap": 0}, arrays), 2)


def test_orders_and_model_infos_cross() -> None:
    order = LoadOrder("m", "cpu", None, "exact", 2, 512, (0, 3), 1 << 30)
    assert messages.load_order(crossed(messages.load_frame(order))) == order
    said = ("r", "n", "float32", "exact", "cpu", "torch", "p", "s")
    info = ModelInfo("A", ("a", "b"), *said, 9, 8, True, {"load": 1.5}, {"cap": None})
    back = messages.model_info(crossed(messages.ready_frame(info)))
    assert back == info and back.ready_s == {"load": 1.5}
    assert back == dataclasses.replace(info, ready_s={}), "a worker that took another time is still the same model"
    assert messages.note(crossed(messages.note_frame("half way"))) == "half way"
    assert messages.note(messages.ready_frame(info)) is None
    assert messages.born_pid(crossed(messages.born_frame(42))) == 42
    assert messages.refusal(crossed(messages.refused_frame("no"))) == "no"
    assert messages.refusal(messages.ready_frame(info)) is None


@pytest.mark.parametrize("read", [messages.born_pid, messages.model_info, messages.load_order])
def test_an_incomplete_frame_is_refused(read: Callable[[Frame], object]) -> None:
    for kind in ("born", "ready", "load"):
        with pytest.raises(LinkError):
            read(Frame(kind, {"nothing": 1}))
