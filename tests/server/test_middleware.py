"""What stands between the socket and the routes, over real sockets: limits, keys, disconnects, error answers."""

import asyncio
import base64
import contextlib
import dataclasses
import gc
import json
import logging
import socket
import threading
import time

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from plaudit_server import protocol
from plaudit_server.errors import RequestError
from plaudit_server.gates import PUBLIC, gates
from plaudit_server.metrics import Metrics
from plaudit_server.middleware import Body, Gate, Report, model_in_path
from plaudit_server.settings import Limits, ServerSettings

LIMITS = Limits(body_bytes=50_000, held_bytes=60_000, header_bytes=4_000, headers=20, header_seconds=60.0)
HASTY = dataclasses.replace(LIMITS, header_seconds=0.6, body_seconds=0.6)
KEY = "correct-horse-battery"


class Probe:
    """The application behind the middleware: it notes what became of each request."""

    def __init__(self):
        self.events = []
        self.release = threading.Event()

    async def echo(self, request: Request):
        body = await request.body()
        model = getattr(request.state, "model", None)
        return JSONResponse({"bytes": len(body), "model": model, "id": request.state.request_id})

    async def wait(self, request: Request):
        self.events.append("started")
        try:
            while not self.release.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.events.append("cancelled")
            raise
        return JSONResponse({})

    async def refuse(self, request: Request):
        raise RequestError("overloaded", "full", retry_after=2.0)

    async def fail(self, request: Request):
        raise ValueError("-".join(("SECRET", "WORDS")))

    async def break_off(self, request: Request):
        async def body():
            yield b"half"
            raise ValueError("-".join(("SECRET", "WORDS")))

        return StreamingResponse(body())


@contextlib.contextmanager
def listening(settings: ServerSettings):
    probe, metrics = Probe(), Metrics()
    names = ("echo", "wait", "refuse", "fail", "break_off")
    app = Starlette(
        routes=[Route(f"/{name}", getattr(probe, name), methods=["POST", "GET"]) for name in names]
        + [Route("/livez", probe.echo)],
        middleware=[
            Middleware(Report, metrics=metrics, paths=[*(f"/{name}" for name in names), "/livez"]),
            Middleware(Gate, checks=[*gates(settings), model_in_path]), Middleware(Body, limits=settings.limits),
        ],
    )  # fmt: skip
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, **protocol.arguments(settings.limits)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1], probe, metrics
    finally:
        probe.release.set()
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def open_server():
    with listening(ServerSettings(limits=LIMITS)) as running:
        yield running


@pytest.fixture
def port(open_server):
    return open_server[0]


@pytest.fixture(scope="module")
def hasty_port():
    with listening(ServerSettings(limits=HASTY)) as (port, _, _):
        yield port


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def head(path="/echo", *headers, method="POST", host="localhost"):
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"host: {host}", *headers, "", ""]).encode()


def answer(connection):
    """Status, headers and body of the next answer on a connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := connection.recv(65536)):
            return None, {}, b""
        data += more
    top, _, body = data.partition(b"\r\n\r\n")
    lines = top.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    return int(lines[0].split()[1]), headers, body


def ask(port, request):
    with connect(port) as connection:
        connection.sendall(request)
        return answer(connection)


def closed(connection):
    """The server closes it, and may have done so before it had read all."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def code(body):
    return json.loads(body)["error"]["code"]


def until(condition):
    """Wait for something that must happen; the test's own time limit is the only clock."""
    while not condition():
        time.sleep(0.01)


def test_a_request_id_is_echoed_or_made(port):
    _, headers, body = ask(port, head("/echo", "x-request-id: rollout-17.a"))
    assert headers["x-request-id"] == json.loads(body)["id"] == "rollout-17.a"
    for hostile in ("x" * 65, "a b", "a\x0bb", "\u00e9"):
        _, headers, _ = ask(port, head("/echo", f"x-request-id: {hostile}"))
        assert hostile not in headers.get("x-request-id", "") and len(headers.get("x-request-id", "x" * 24)) == 24
    made = [ask(port, head("/echo"))[1]["x-request-id"] for _ in range(3)]
    assert len(set(made)) == 3


def test_bodies_are_bounded_by_what_is_announced_and_by_what_comes(port):
    assert ask(port, head("/echo", "content-length: 50000") + b"x" * 50_000)[0] == 200
    status, _, body = ask(port, head("/echo", "content-length: 50001"))
    assert (status, code(body)) == (413, "body_too_large")
    chunk = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
    status, _, body = ask(port, head("/echo", "transfer-encoding: chunked") + chunk * 13)
    assert (status, code(body)) == (413, "body_too_large")
    status, _, body = ask(port, head("/echo", "transfer-encoding: chunked") + chunk * 3 + b"0\r\n\r\n")
    assert status == 200 and json.loads(body)["bytes"] == 3 * 0x1000


def test_the_connection_survives_a_refused_body(port):
    with connect(port) as connection:
        connection.sendall(head("/echo", "content-length: 60000") + b"x" * 60_000)
        assert answer(connection)[0] == 413
        connection.sendall(head("/echo", "content-length: 2") + b"{}")
        assert answer(connection)[0] == 200


def test_all_bodies_together_are_bounded_and_given_back(open_server):
    port, probe, _ = open_server
    probe.events.clear()
    with connect(port) as holder:
        holder.sendall(head("/wait", "content-length: 40000") + b"x" * 40_000)
        until(lambda: "started" in probe.events)
        status, headers, body = ask(port, head("/echo", "content-length: 40000") + b"x" * 40_000)
        assert (status, code(body)) == (503, "overloaded") and "retry-after" in headers
    until(lambda: "cancelled" in probe.events)
    assert ask(port, head("/echo", "content-length: 40000") + b"x" * 40_000)[0] == 200


def test_a_slow_body_is_not_waited_for(hasty_port):
    with connect(hasty_port) as connection:
        connection.sendall(head("/echo", "content-length: 100") + b"x")
        status, _, body = answer(connection)
    assert (status, code(body)) == (408, "body_timeout")


def test_headers_are_bounded_in_bytes_and_number(port):
    for request in (head("/echo", "x: " + "y" * 5_000), head("/echo", *(["a: b"] * 21)), head("/echo?" + "q" * 5_000)):
        status, _, body = ask(port, request)
        assert (status, code(body)) == (431, "headers_too_large")


def test_headers_without_an_end_are_cut_off(port):
    with connect(port) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(head("/echo")[:-2])
            for _ in range(300):
                connection.sendall(b"x: " + b"y" * 10_000 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            assert answer(connection)[0] in (431, None)


def test_a_head_that_trickles_and_a_connection_that_says_nothing_are_closed(hasty_port):
    with connect(hasty_port) as silent, connect(hasty_port) as slow:
        slow.sendall(b"POST /echo HT")
        assert closed(silent) and closed(slow)


def test_a_kept_connection_gets_the_same_bounds_for_its_next_request(hasty_port):
    with connect(hasty_port) as connection:
        connection.sendall(head("/echo", "content-length: 2") + b"{}")
        assert answer(connection)[0] == 200
        connection.sendall(b"POST /echo HT")
        assert closed(connection)


def pause(port):
    """Until the server has read what was sent before."""
    assert ask(port, head("/livez", method="GET"))[0] == 200


def outlast(port):
    """Until the time of every head that has begun before is over."""
    with connect(port) as silent:
        assert closed(silent)


def test_the_time_of_a_head_that_came_in_pieces_ends_with_it():
    with listening(ServerSettings(limits=HASTY)) as (port, probe, _), connect(port) as connection:
        request = head("/wait", "content-length: 2") + b"{}"
        connection.sendall(request[:20])
        pause(port)
        connection.sendall(request[20:])
        until(lambda: probe.events)
        outlast(port)
        assert probe.events == ["started"]
        probe.release.set()
        assert answer(connection)[0] == 200


@pytest.mark.parametrize("between", [b"", head("/echo", "content-length: 2") + b"{}"])
def test_the_time_of_a_head_begins_when_nobody_waits_for_an_answer(between):
    """A slow score does not end because half of the next request is there already."""
    hasty = listening(ServerSettings(limits=HASTY))
    with hasty as (port, probe, _), connect(port) as patient, connect(port) as stuck:
        for connection in (patient, stuck):
            connection.sendall(head("/wait", "content-length: 2") + b"{}" + between + b"POST /echo HT")
        until(lambda: len(probe.events) == 2)
        outlast(port)
        assert probe.events == ["started"] * 2
        patient.sendall(b"TP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 3\r\n\r\nabc")
        pause(port)
        probe.release.set()
        assert [top for top, _ in answers(patient)] == [b"200 OK"] * (3 if between else 2)
        assert [top for top, _ in answers(stuck)] == [b"200 OK"] * (2 if between else 1)


@pytest.mark.parametrize("more", [b"y" * 5_000, b"\r\nconnection: close\r\n\r\n"])
def test_a_head_that_is_too_large_is_answered_behind_what_came_with_it(more):
    with listening(ServerSettings(limits=HASTY)) as (port, probe, _), connect(port) as connection:
        connection.sendall(head("/wait", "content-length: 2") + b"{}" + head("/echo")[:-2] + b"x: " + b"y" * 5_000)
        until(lambda: probe.events)
        outlast(port)
        connection.sendall(more)
        pause(port)
        probe.release.set()
        (first, _), (second, body) = answers(connection)
        assert (first[:3], second[:3], code(body)) == (b"200", b"431", "headers_too_large")


def test_a_kept_connection_that_sends_no_request_is_closed_in_time():
    impatient = ServerSettings(limits=dataclasses.replace(LIMITS, idle_seconds=1))
    with listening(impatient) as (port, _, _), connect(port) as empty_line, connect(port) as too_much:
        empty_line.sendall(head("/echo", "content-length: 2") + b"{}")
        too_much.sendall(head("/echo", "content-length: 60000"))
        assert answer(empty_line)[0] == 200 and answer(too_much)[0] == 413
        empty_line.sendall(b"\r\n")
        too_much.sendall(b"x")
        assert closed(empty_line) and closed(too_much)


def test_requests_far_ahead_of_their_answers_end_the_connection(open_server):
    port, probe, _ = open_server
    probe.events.clear()
    with connect(port) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(head("/echo", method="GET") * 20_000 + head("/wait", method="GET"))
        while connection.recv(1 << 20):
            pass
    assert not probe.events and ask(port, head("/livez", method="GET"))[0] == 200


def test_ambiguous_lengths_are_refused(port):
    request = head("/echo", "content-length: 4", "transfer-encoding: chunked") + b"0\r\n\r\n"
    assert ask(port, request)[0] == 400


def lengths(connection, request):
    """What the echo route counts of the body of each of the requests, the last of which closes."""
    connection.sendall(request)
    return [json.loads(body)["bytes"] if top == b"200 OK" else top for top, body in answers(connection)]


def answers(connection):
    """First line and body of every answer until the connection is closed."""
    received = b"".join(iter(lambda: connection.recv(65536), b""))
    found = [part.partition(b"\r\n\r\n") for part in received.split(b"HTTP/1.1 ")[1:]]
    return [(top.split(b"\r\n")[0], body) for top, _, body in found]


WISHES = ["connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABk"]


def test_a_body_behind_a_wish_for_another_protocol_is_a_body_and_no_request(port):
    body = head("/echo", "content-length: 2") + b"{}"
    wishing = [*WISHES, f"content-length: {len(body)}"]
    last = head("/echo", "connection: close", "content-length: 0")
    with connect(port) as connection:
        connection.sendall(head("/echo", "expect: 100-continue", *wishing))
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert lengths(connection, body + last) == [len(body), 0]
    chunked = head("/echo", *WISHES, "transfer-encoding: chunked") + b"3\r\nabc\r\n0\r\n\r\n"
    with connect(port) as connection:
        requests = head("/echo", *wishing) + body + chunked + head("/echo", *WISHES, method="GET") + body + last
        assert lengths(connection, requests) == [len(body), 3, 0, 2, 0]


def test_who_wishes_for_another_protocol_and_to_close_is_answered(port):
    good, wish = head("/echo", "content-length: 2") + b"{}", ["connection: close, upgrade", "upgrade: h2c"]
    last = head("/echo", *wish, "content-length: 3") + b"{ }"
    for before in ([], [2]):
        with connect(port) as connection:
            assert lengths(connection, good * len(before) + last + good) == [*before, 3]


def test_what_follows_a_body_is_no_header(port):
    """A gateway looks at the headers; and of trailers there may be as many as fit into twice the largest body."""
    trailer = b"0\r\nx-request-id: of-the-trailer\r\n" + b"a: b\r\n" * LIMITS.headers + b"\r\n"
    status, headers, _ = ask(port, head("/echo", "transfer-encoding: chunked") + trailer)
    assert status == 200 and headers["x-request-id"] != "of-the-trailer"


def test_what_cannot_be_read_is_answered_in_its_turn_in_the_one_shape(open_server):
    port, _, metrics = open_server
    good = head("/echo", "content-length: 2") + b"{}"
    broken = head("/echo", "transfer-encoding: chunked") + b"nonsense\r\n"
    for bad in (b"nonsense\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", head("a:1", method="CONNECT"), broken):
        with connect(port) as connection:
            connection.sendall(good + good + bad + good)
            first, second, (top, body) = answers(connection)
        assert first[0] == second[0] == b"200 OK" and top == b"400 Bad Request"
        assert code(body) == "invalid_http" and json.loads(body)["error"]["request_id"]
    for route in (b"unknown", b"/echo"):
        until(lambda route=route: b'plaudit_requests_total{route="%b",status="400"}' % route in metrics.exposition())


def test_content_encodings_are_refused_and_identity_is_not(port):
    status, _, body = ask(port, head("/echo", "content-encoding: gzip", "content-length: 0"))
    assert (status, code(body)) == (415, "unsupported_encoding")
    assert ask(port, head("/echo", "content-encoding: identity", "content-type: text/plain"))[0] == 200


def test_a_client_that_goes_away_cancels_its_work(open_server):
    port, probe, metrics = open_server
    probe.events.clear()
    connections = [connect(port) for _ in range(8)]
    for connection in connections:
        connection.sendall(head("/wait", "content-length: 2") + b"{}")
    until(lambda: probe.events.count("started") == 8)
    for connection in connections:
        connection.close()
    until(lambda: probe.events.count("cancelled") == 8)
    until(lambda: b'route="/wait",status="499"' in metrics.exposition())


def test_a_client_that_goes_away_cancels_its_work_with_another_request_behind_it(open_server):
    port, probe, _ = open_server
    probe.events.clear()
    with connect(port) as connection:
        connection.sendall(head("/wait", "content-length: 2") + b"{}" + head("/echo", "content-length: 2") + b"{}")
        until(lambda: "started" in probe.events)
    until(lambda: "cancelled" in probe.events)


def test_an_answer_comes_whole_and_the_next_request_may_be_there_already(port):
    request = head("/echo", "content-length: 2") + b"{}"
    with connect(port) as connection:
        for _ in range(3):
            connection.sendall(request)
            top, _, body = connection.recv(65536).partition(b"\r\n\r\n")
            assert json.loads(body)["bytes"] == 2  # one write: the head did not come by itself
            assert {line.split(b":")[0] for line in top.split(b"\r\n")[1:]} == {
                b"date", b"content-length", b"content-type", b"x-request-id"
            }  # fmt: skip
        connection.sendall(request * 2 + head("/refuse", "content-length: 0") + request)
        received = b""
        while received.count(b"HTTP/1.1 ") < 4 or not received.endswith(b"}"):
            received += connection.recv(65536)
        assert [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"503", b"200"]


def test_head_requests_and_clients_that_close_are_answered_as_ever(port):
    with connect(port) as connection:
        connection.sendall(head("/livez", method="HEAD"))
        received = connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 200") and received.endswith(b"\r\n\r\n")
        connection.sendall(head("/echo", "connection: close", "content-length: 2") + b"{}")
        status, headers, body = answer(connection)
        assert (status, headers["connection"], json.loads(body)["bytes"]) == (200, "close", 2)
        assert connection.recv(1) == b""
    with connect(port) as connection:
        connection.sendall(head("/echo", "content-length: 2").replace(b"HTTP/1.1", b"HTTP/1.0") + b"{}")
        assert answer(connection)[1]["connection"] == "close" and connection.recv(1) == b""


def test_what_a_request_held_is_given_back_without_the_garbage_collector(port):
    gc.collect()
    gc.disable()
    try:
        before = len(connections())
        for _ in range(3):
            with connect(port) as kept:
                kept.sendall(head("/echo", "content-length: 40000") + b"x" * 40_000)
                assert answer(kept)[0] == 200
                until(lambda: not any(one.scope and "body" in one.scope["state"] for one in connections()))
        until(lambda: len(connections()) <= before)
    finally:
        gc.enable()


def connections():
    """Those that are still in memory."""
    return [one for one in gc.get_objects() if issubclass(type(one), protocol.Connection)]  # asks no lazy module


def test_a_body_that_waits_to_be_asked_for_is_asked_for(port):
    with connect(port) as connection:
        connection.sendall(head("/echo", "expect: 100-continue", "content-length: 2"))
        assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"{}")
        assert answer(connection)[0] == 200


def test_errors_of_every_origin_have_one_shape_and_no_words_of_the_client(port, caplog):
    status, headers, body = ask(port, head("/refuse", "content-length: 0"))
    assert (status, code(body)) == (503, "overloaded") and headers["retry-after"] in ("2", "3")
    with caplog.at_level(logging.DEBUG):
        status, headers, body = ask(port, head("/fail", "content-length: 0"))
    assert (status, code(body)) == (500, "internal_error")
    assert json.loads(body)["error"]["request_id"] == headers["x-request-id"]
    assert b"SECRET-WORDS" not in body and "SECRET-WORDS" not in caplog.text
    assert "ValueError" in caplog.text and "in fail" in caplog.text


def test_an_answer_that_breaks_off_closes_the_connection(port):
    with connect(port) as connection:
        connection.sendall(head("/break_off", "content-length: 0"))
        received = b""
        while more := connection.recv(65536):
            received += more
    assert received.startswith(b"HTTP/1.1 200") and not received.endswith(b"0\r\n\r\n")


def test_a_model_can_be_named_in_the_path(port):
    for path, model in (("/echo", None), ("/m/tiny/echo", "tiny"), ("/m/tiny@abc/echo", "tiny@abc")):
        assert json.loads(ask(port, head(path, "content-length: 0"))[2])["model"] == model
    assert ask(port, head("/m/echo", "content-length: 0"))[0] == 404
    assert ask(port, head("/m//echo", "content-length: 0"))[0] == 404


def test_a_loopback_server_answers_to_its_own_names_only(port):
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000"):
        assert ask(port, head("/echo", "content-length: 0", host=host))[0] == 200
    status, _, body = ask(port, head("/echo", "content-length: 0", host="attacker.example"))
    assert (status, code(body)) == (421, "host_not_allowed")


@pytest.fixture(scope="module")
def keyed_port():
    with listening(ServerSettings(api_key=KEY, limits=LIMITS)) as (port, _, _):
        yield port


def basic(password):
    return "authorization: Basic " + base64.b64encode(f":{password}".encode()).decode()


@pytest.mark.parametrize(
    "header", [f"authorization: Bearer {KEY}", f"authorization: bearer  {KEY}", f"x-api-key: {KEY}", basic(KEY)]
)
def test_the_key_is_taken_in_each_of_its_forms(keyed_port, header):
    assert ask(keyed_port, head("/echo", header, "content-length: 0", host="any.example"))[0] == 200


@pytest.mark.parametrize(
    "header",
    ["x-nothing: 1", "authorization: Bearer wrong-horse", f"authorization: {KEY}", "authorization: Basic %%%",
     basic("wrong"), "x-api-key:", f"authorization: Bearer {KEY}x", f"authorization: Digest {KEY}"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/echo", "/m/x/echo", "/livez/", "//livez", "/m/x/livez", "/nowhere", "/LIVEZ"])
def test_without_the_key_nothing_but_the_probes_answers(keyed_port, header, path):
    status, headers, body = ask(keyed_port, head(path, header, "content-length: 0"))
    assert (status, code(body)) == (401, "unauthorized") and headers["www-authenticate"].startswith("Basic")
    assert KEY.encode() not in body


def test_who_is_refused_by_the_head_alone_is_counted_by_route():
    with listening(ServerSettings(api_key=KEY, limits=LIMITS)) as (port, _, metrics):
        for path in ("/echo", "/m/tiny@abc/echo", "/nowhere", "/m/x"):
            assert ask(port, head(path, "content-length: 0"))[0] == 401
        assert ask(port, head("/echo", f"x-api-key: {KEY}", "content-length: 60000"))[0] == 413
    found = {
        line.rpartition("{")[2] for line in metrics.exposition().decode().splitlines() if "requests_total{" in line
    }
    counted = {("echo", 401, 2), ("echo", 413, 1)}
    assert found == {f'route="/{route}",status="{status}"}} {n}.0' for route, status, n in counted} | {
        'route="unknown",status="401"} 2.0'
    }


def test_probes_need_no_key(keyed_port):
    assert {"/livez", "/readyz", "/health"} == PUBLIC
    assert ask(keyed_port, head("/livez", method="GET"))[0] == 200
