"""Frames between the front process and its worker, over a Unix socket pair.

A frame is two lengths (header, payload; uint32, little-endian), a small JSON header and a payload of flat
arrays laid end to end, int32 or float32, little-endian. There is no pickle, and every length is checked before
it is believed: a worker that has lost its mind must not take the front with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LENGTHS = struct.Struct("<II")
_MOST_HEADER = 1 << 16
_MOST_PAYLOAD = 1 << 30
_GLANCE = 5e-5
"""Seconds: what waiting for two things at once may add to either."""

_DTYPES: dict[str, Any] = {"int32": np.dtype("<i4"), "float32": np.dtype("<f4")}

Array = NDArray[np.int32] | NDArray[np.float32]


class LinkError(Exception):
    """The bytes on the link are not a frame."""

    exit_code = 69


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """`kind` says what it is; `fields` are JSON values, `arrays` one-dimensional."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)


def to_bytes(frame: Frame) -> bytes:
    """The frame as it goes over the wire. Raises LinkError if it is too large or holds another dtype."""
    layout = [[name, array.dtype.name, len(array)] for name, array in frame.arrays.items()]
    if other := [dtype for _, dtype, _ in layout if dtype not in _DTYPES]:
        raise LinkError(f"a frame holds int32 and float32 arrays, not {other[0]}")
    header = json.dumps({"kind": frame.kind, "fields": dict(frame.fields), "arrays": layout}).encode()
    parts = [array.astype(_DTYPES[array.dtype.name], copy=False).tobytes() for array in frame.arrays.values()]
    lengths = _LENGTHS.pack(*_checked(len(header), sum(map(len, parts))))
    return b"".join([lengths, header, *parts])


def from_bytes(header: bytes, payload: bytes) -> Frame:
    """The frame of a header and its payload; its arrays are read-only views. Raises LinkError."""
    try:
        data = json.loads(header)
        kind, fields, layout = data["kind"], data["fields"], data["arrays"]
        shapes = [(str(name), _DTYPES[dtype], int(length)) for name, dtype, length in layout]
    except (ValueError, KeyError, TypeError) as error:
        raise LinkError(f"the header of a frame is not what it should be: {error}") from error
    if any(length < 0 for *_, length in shapes) or sum(4 * length for *_, length in shapes) != len(payload):
        raise LinkError("the arrays of a frame do not fill its payload")
    arrays: dict[str, Array] = {}
    offset = 0
    for name, dtype, length in shapes:
        arrays[name] = np.frombuffer(payload, dtype, length, offset)
        offset += 4 * length
    return Frame(kind, fields, arrays)


class SocketLink:
    """The worker's end: blocking."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, frame: Frame) -> None:
        self._socket.sendall(to_bytes(frame))

    def receive(self) -> Frame | None:
        """The next frame; None when the other end is gone. Raises LinkError."""
        lengths = self._exactly(_LENGTHS.size)
        if lengths is None:
            return None
        header_length, payload_length = _checked(*_LENGTHS.unpack(lengths))
        header, payload = self._exactly(header_length), self._exactly(payload_length)
        return None if header is None or payload is None else from_bytes(header, payload)

    def arrives_before(self, happened: Callable[[], bool]) -> bool:
        """Whether a frame, or the end of the link, comes before something that nothing but asking tells of."""
        while not happened():
            if select.select([self._socket], [], [], _GLANCE)[0]:
                return True
        return False

    def _exactly(self, length: int) -> bytes | None:
        buffer = bytearray(length)
        view, filled = memoryview(buffer), 0
        while filled < length:
            received = self._socket.recv_into(view[filled:])
            if not received:
                return None
            filled += received
        return bytes(buffer)


class StreamLink:
    """The front's end: asyncio."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def over(cls, end: socket.socket) -> StreamLink:
        """A link over one end of a socket pair, which it owns from now on."""
        end.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=end))

    def send(self, frame: Frame) -> None:
        """Queue a frame. The engine keeps no more than two batches on the link, so the queue stays small."""
        self._writer.write(to_bytes(frame))

    async def receive(self) -> Frame | None:
        """The next frame; None when the other end is gone. Raises LinkError."""
        try:
            header_length, payload_length = _checked(*_LENGTHS.unpack(await self._reader.readexactly(_LENGTHS.size)))
            header = await self._reader.readexactly(header_length)
            payload = await self._reader.readexactly(payload_length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return from_bytes(header, payload)

    def hang_up(self) -> None:
        self._writer.close()

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):  # the other end was gone first: nothing is left to flush
            await self._writer.wait_closed()


def _checked(header_length: int, payload_length: int) -> tuple[int, int]:
    if header_length > _MOST_HEADER or payload_length > _MOST_PAYLOAD:
        raise LinkError(f"a frame of {header_length} + {payload_length} bytes is larger than any of ours")
    return header_length, payload_length
