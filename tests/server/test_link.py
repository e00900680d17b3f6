from __future__ import annotations

import asyncio
import socket
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaudit_server.link import Frame, LinkError, SocketLink, StreamLink, from_bytes, to_bytes

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8,
)  # fmt: skip
_arrays = st.dictionaries(
    st.text(min_size=1, max_size=4),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20).map(lambda x: np.array(x, np.int32))
    | st.lists(st.floats(width=32), max_size=20).map(lambda x: np.array(x, np.float32)),
    max_size=4,
)


def same(a: Frame, b: Frame) -> bool:
    return (a.kind, dict(a.fields), list(a.arrays)) == (b.kind, dict(b.fields), list(b.arrays)) and all(
        x.dtype == y.dtype and x.tobytes() == y.tobytes()
        for x, y in zip(a.arrays.values(), b.arrays.values(), strict=True)
    )


def split(data: bytes) -> tuple[bytes, bytes]:
    header, payload = struct.unpack_from("<II", data)
    assert len(data) == 8 + header + payload
    return data[8 : 8 + header], data[8 + header :]


@given(st.text(), st.dictionaries(st.text(), _json, max_size=3), _arrays)
def test_what_goes_in_comes_out(kind: str, fields: dict, arrays: dict) -> None:
    frame = Frame(kind, fields, arrays)
    assert same(from_bytes(*split(to_bytes(frame))), frame)


@given(st.binary(max_size=200), st.binary(max_size=50))
def test_noise_is_refused_and_nothing_else_is_raised(header: bytes, payload: bytes) -> None:
    try:
        frame = from_bytes(header, payload)
    except LinkError:
        return
    assert isinstance(frame, Frame)


@pytest.mark.parametrize("header", [
    b'{"kind":"x","fields":{},"arrays":[["a","int32",2]]}', b'{"kind":"x","fields":{},"arrays":[["a","int32",-1]]}',
    b'{"kind":"x","fields":{},"arrays":[["a","object",1]]}', b'{"kind":"x","arrays":[]}', b"[]", b"\xff",
])  # fmt: skip
def test_a_header_that_does_not_describe_its_payload_is_refused(header: bytes) -> None:
    with pytest.raises(LinkError):
        from_bytes(header, b"\0\0\0\0")


def test_other_dtypes_do_not_travel() -> None:
    with pytest.raises(LinkError, match="float64"):
        to_bytes(Frame("x", {}, {"a": np.zeros(2)}))  # type: ignore[dict-item]


def test_frames_cross_a_socket_both_ways_and_the_end_is_seen() -> None:
    big = Frame("big", {"n": 1}, {"ids": np.arange(300_000, dtype=np.int32)})

    async def front(end: socket.socket) -> list[Frame | None]:
        link = await StreamLink.over(end)
        link.send(big)
        link.send(Frame("bye"))
        received = [await link.receive(), await link.receive(), await link.receive()]
        await link.close()
        return received

    def worker(end: socket.socket) -> list[Frame | None]:
        with end:
            link = SocketLink(end)
            received = [link.receive(), link.receive()]
            link.send(big)
            link.send(Frame("bye"))
            return received

    async def both() -> tuple[list[Frame | None], list[Frame | None]]:
        ours, theirs = socket.socketpair()
        there = asyncio.to_thread(worker, theirs)
        return tuple(await asyncio.gather(front(ours), there))  # type: ignore[return-value]

    here, there = asyncio.run(both())
    assert here[0] is not None and same(here[0], big) and here[1] is not None and here[1].kind == "bye"
    assert here[2] is None
    assert there[0] is not None and same(there[0], big)


@pytest.mark.parametrize("lengths", [(1 << 17, 0), (10, 1 << 31)])
def test_an_impossible_length_is_refused_before_it_is_believed(lengths: tuple[int, int]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(struct.pack("<II", *lengths))
        with pytest.raises(LinkError, match="larger"):
            SocketLink(theirs).receive()


def test_a_frame_cut_short_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.sendall(to_bytes(Frame("x", {}, {"a": np.zeros(4, np.float32)}))[:-3])
        ours.close()
        assert SocketLink(theirs).receive() is None
