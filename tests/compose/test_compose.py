"""`plaudit compose` as a process of its own, in front of the real server."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from plaudit import Client, cli
from plaudit.errors import NotFound
from plaudit.rewards.compose import Candidate, Composer, Reward
from plaudit.rewards.config import ENDS, read_rewards
from plaudit_compose.app import Routes, _number, _seconds
from plaudit_compose.envelope import response_in
from plaudit_server.errors import RequestError
from plaudit_server.settings import ServerSettings

PROGRAM = """
import sys
from importlib.metadata import EntryPoint
from plaudit import cli
sys.exit(cli.run(sys.argv[1:], {"compose": EntryPoint("compose", "plaudit_compose.cli:compose", cli.GROUP)}))
"""
FILE = """
floor = -20.0

[[terms]]
name = "preference"
kind = "model"
url = "URL"
seconds = 3.0
clip = [-1, 1]
weight = 0.5

[[terms]]
name = "right"
kind = "numeric"
weight = 3.0
required = true

[[terms]]
kind = "length"
limit = 4
weight = 0.1
"""
Compose = Callable[..., tuple[str, subprocess.Popen[str]]]


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    """`compose(text, *options)` runs the command on rewards of this text; its URL and process."""
    started: list[subprocess.Popen[str]] = []

    def run(text: str, *options: str) -> tuple[str, subprocess.Popen[str]]:
        (tmp_path / "rewards.toml").write_text(text)
        command = [sys.executable, "-P", "-c", PROGRAM, "compose", str(tmp_path / "rewards.toml"), "--port", "0"]
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=log, text=True)
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready: "):
                return line.split()[1], process
        raise AssertionError(f"exit code {process.wait()}: {(tmp_path / 'log').read_text()}")

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def test_rewards_of_a_real_server_and_of_what_can_be_verified(
    compose: Compose, serve: Callable[..., Any], reward_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    model = serve(reward_model_dir("qwen3"))
    url, process = compose(FILE.replace("URL", model.url))
    responses = ["It is 4", "4", "5", "four"]
    with Client(model.url) as direct, Client(url) as composed, httpx.Client(base_url=url) as http:
        scores = [float(result) for result in direct.score_responses("2+2?", responses)]
        body = {
            "items": [{"prompt": "2+2?", "responses": responses, "reference": 4}, {"prompt": "2+2?", "response": "4"}]
        }
        answer = http.post("/score", json=body).json()
        expected = [
            0.5 * min(max(s, -1), 1) + 3 - 0.1 * max(0, len(r) - 4) for s, r in zip(scores, responses, strict=True)
        ]
        assert answer["scores"][:2] == pytest.approx(expected[:2]) and answer["scores"][2:4] == [-20.0, -20.0]
        first, wrong, bare = (answer["results"][place] for place in (0, 2, 4))
        assert first["attributes"] == {"preference": scores[0], "right": 1.0, "length": -3.0} and "floor" not in first
        assert wrong["floor"] == "right" and (first["response_index"], bare["item_index"]) == (0, 1)
        assert answer["scores"][4] is None and bare["error"]["code"] == "missing_reference"
        single = http.post("/score", json={"prompt": "2+2?", "response": "4", "label": "4"}).json()
        assert single["score"] == answer["scores"][1]  # as slime sends it
        alone = http.post("/score", json={"prompt": "2+2?", "response": "4"})
        assert alone.status_code == 422 and alone.json()["error"]["code"] == "missing_reference"

        chat = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        queries = [chat + "4<|im_end|>\n", "[PAD]" + chat + "5<|im_end|>"]
        reward = {"query": queries, "prompts": [chat, chat], "labels": ["4", "4"]}
        native = httpx.post(model.url + "/get_reward", json={"query": queries}).json()["rewards"]
        got = http.post("/get_reward", json=reward).json()
        assert got["extra_logs"]["preference"] == native and got["extra_logs"]["right"] == [1.0, 0.0]
        assert got["rewards"] == [pytest.approx(0.5 * min(max(native[0], -1), 1) + 3), -20.0] == got["scores"]
        assert http.post("/get_reward", json={"query": []}).json()["rewards"] == []
        for change, code in (
            ({"prompts": None}, "no_boundary"),
            ({"prompts": ["user"] * 2}, "no_boundary"),
            ({"labels": ["4", ""]}, "missing_reference"),
        ):
            failed = http.post("/get_reward", json=reward | change)
            assert (failed.status_code, failed.json()["error"]["code"]) == (422, code)

        assert "HTTP Request" not in (tmp_path / "log").read_text()
        info = composed.info()
        assert info.identity.model == "composed" and http.get("/readyz").status_code == 200
        assert info.identity.revision == answer["revision"] == single["revision"]
        bad: list[tuple[dict[str, Any], int]] = [
            ({"prompt": "x"}, 422),
            ({"prompt": "x", "response": "y", "typo": 1}, 422),
            ({"items": 3}, 422),
            ({"items": [{"prompt": "x", "response": "y"}], "model": "other"}, 404),
            ({"prompt": "x", "response": "y", "transform": "normalized"}, 422),
            ({"prompt": "x", "response": "y", "deadline_ms": "soon"}, 422),
            ({"prompt": "x", "response": "y", "deadline_ms": 10**400}, 422),
            ({"prompt": "x", "response": "y", "deadline_ms": 0.001}, 504),
        ]
        assert [http.post("/score", json=body).status_code for body, _ in bad] == [status for _, status in bad]
        assert (
            http.post("/nothing", json={}).status_code == 404 and http.post("/score", content=b"{").status_code == 400
        )

        assert model.end() == 0  # from here on the model's server is gone
        items = {"items": [{"prompt": "p", "response": "4", "reference": 4}] * 2}
        with ThreadPoolExecutor() as threads:
            asked = [threads.submit(http.post, path, json=body, timeout=60)
                     for path, body in (("/score", items), ("/get_reward", reward))]  # fmt: skip
            assert http.get("/readyz", timeout=60).status_code == 503 and http.get("/livez").status_code == 200
        assert [answer.result().status_code for answer in asked] == [503, 503]
        assert asked[0].result().json()["error"]["retryable"] is True
    process.terminate()
    assert process.wait(30) == 0


def test_what_a_models_server_refuses_is_met_at_the_start_and_is_no_outage(
    served_url: Callable[[str], str], tmp_path: Path
) -> None:
    """A trainer goes on asking for minutes where it is told that a model is unavailable."""
    path = tmp_path / "rewards.toml"
    path.write_text(FILE.replace("URL", served_url("qwen3")).replace('"model"', '"model"\nmodel = "other"'))

    async def refusals() -> list[Reward]:
        composer = Composer(read_rewards(path))
        candidate = Candidate({"prompt": "p", "response": "4"}, "4", 4)
        try:
            with pytest.raises(NotFound, match="no such model is served here"):
                await composer.start(30.0)
            return await composer.rewards_of([candidate] * 2)
        finally:
            await composer.close()

    for reward in asyncio.run(refusals()):
        assert reward.score is None and reward.error is not None
        assert reward.error.code == "scoring_failed" and not reward.error.retryable
        assert reward.error.message.startswith("preference: ")


def test_a_models_server_is_told_how_long_the_caller_waits(tmp_path: Path) -> None:
    """And never longer than the term does. The server is one that notes the deadline and refuses."""
    told: list[float] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b'"deadline_ms":')
        told.append(int((await reader.readuntil(b"}"))[:-1]))
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async def ask(route: Callable[[Request], Any], query: str, body: dict[str, Any]) -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": json.dumps(body).encode()}

        with pytest.raises(RequestError) as refused:
            await route(Request({"type": "http", "query_string": query.encode(), "headers": []}, receive))
        assert refused.value.code == "scoring_failed"

    async def run() -> None:
        async with await asyncio.start_server(note, "127.0.0.1", 0) as upstream:
            url = f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}"
            patient = re.sub(r"seconds = .*", "seconds = 9000", FILE.replace("URL", url))
            (tmp_path / "rewards.toml").write_text(patient)
            composer = Composer(read_rewards(tmp_path / "rewards.toml"))
            routes = Routes(ServerSettings(), composer)
            item = {"prompt": "p", "response": "4", "reference": 4}
            queries = {"query": ["Q4"], "prompts": ["Q"], "labels": [4]}
            for milliseconds in (3_000_000, 80_000_000):
                await ask(routes.score, "", {**item, "deadline_ms": milliseconds})
                await ask(routes.get_reward, f"deadline_ms={milliseconds}", queries)
            await ask(routes.score, "", item)
            await composer.close()

    asyncio.run(run())
    assert [round(milliseconds, -6) for milliseconds in told] == [3e6, 3e6, 9e6, 9e6, 9e6]


@pytest.mark.parametrize("deadline", ["soon", "nan", "-1", "0", "1e400"])
def test_a_deadline_of_a_url_that_is_none_is_refused(deadline: str) -> None:
    with pytest.raises(RequestError, match="deadline_ms must be positive"):
        _seconds(_number(deadline))


def test_without_a_model_it_needs_no_server_and_code_must_be_allowed(compose: Compose, tmp_path: Path) -> None:
    terms = '[[terms]]\nkind = "json_schema"\nschema = { type = "array" }\n[[terms]]\nkind = "code"\nweight = 2\n'
    with pytest.raises(AssertionError, match=r"exit code 78: error: .*--allow-code"):
        compose(terms)
    url, _ = compose(terms, "--allow-code-unisolated", "--api-key", "long-enough")
    item = {"prompt": "p", "response": "[1]", "reference": [{"input": "", "output": ""}]}
    assert httpx.post(url + "/score", json=item).status_code == 401
    answer = httpx.post(url + "/score", json=item, headers={"x-api-key": "long-enough"}).json()
    assert answer["score"] == 3.0 and answer["results"][0]["attributes"] == {"json_schema": 1.0, "code": 1.0}


def test_a_pattern_without_end_costs_its_item_and_nobody_else(compose: Compose) -> None:
    url, _ = compose('[[terms]]\nkind = "regex"\npattern = "(a|aa)+$"\n')
    items = [{"prompt": "p", "response": response} for response in ("aaa", "a" * 60 + "!", "b")]
    with ThreadPoolExecutor() as threads:
        scored = threads.submit(httpx.post, url + "/score", json={"items": items}, timeout=60)
        while not scored.done():
            assert httpx.get(url + "/livez", timeout=60).status_code == 200
    answer = scored.result().json()
    assert answer["scores"] == [1.0, None, 0.0] and answer["results"][1]["error"]["code"] == "pattern_timeout"


def test_a_bad_file_or_schema_is_refused_at_the_start(compose: Compose) -> None:
    for text, reason in (("", "terms"), ('[[terms]]\nkind="json_schema"\nschema={ type = "no" }\n', "schema")):
        with pytest.raises(AssertionError, match=rf"exit code 78: error: .*{reason}"):
            compose(text)
    with pytest.raises(AssertionError, match="exit code 69"):
        compose(FILE.replace("URL", "http://127.0.0.1:9"), "--wait", "0.2")


CHAT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
LLAMA = "<|start_header_id|>user<|end_header_id|>\n\nuser<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
QWEN = "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nYou are<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("query", "prompt", "response"),
    [
        (CHAT + "4<|im_end|>\n", CHAT, "4"),
        ("[PAD][PAD]" + CHAT + "4", CHAT, "4"),
        ("<|begin_of_text|>" + LLAMA + "user is a word<|eot_id|>", LLAMA, "user is a word"),
        ("<|endoftext|><|endoftext|>user: hi\nuser: hi\nassistant:", "user: hi\n", "user: hi\nassistant:"),
        ("<s> </s><bos>Q: 2+2? A:", "Q:", " 2+2? A:"),
        ("<｜begin▁of▁sentence｜><｜User｜>hi<｜Assistant｜>yo", "<｜User｜>hi<｜Assistant｜>", "yo"),
        (CHAT + "the user says", "user", None),
        ("<|begin_of_text|>" + LLAMA + "ok", "user", None),
        (QWEN + "ok", "You are", None),
        (CHAT + "4", "2+2?", None),
        ("<start_of_turn>user\nuser<end_of_turn>\n<start_of_turn>model\nok", "user", None),
        ("[INST] INST [/INST] ok", "INST", None),
        (CHAT + "4", "3+3?", None),
        (CHAT + "4", "", None),
        (CHAT + "4", None, None),
        ("<padpad>" * 5000 + "x" + CHAT + "4", CHAT, None),  # read once, whatever it is
        ("<" * 9000 + CHAT + "4", CHAT, None),
        ("<endpad>" * 5000 + CHAT + "4", CHAT, "4"),
    ],
)
def test_a_response_begins_after_the_rendered_prompt_or_nobody_knows_where(
    query: str, prompt: Any, response: str | None
) -> None:
    assert response_in(query, prompt, ENDS) == response


def test_help_keeps_the_lines_of_its_example(capsys: pytest.CaptureFixture[str]) -> None:
    entry = EntryPoint("compose", "plaudit_compose.cli:compose", cli.GROUP)
    assert cli.run(["compose", "--help"], {"compose": entry}) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    start = lines.index("[[terms]]")
    expected = ['kind = "model"', 'url = "http://127.0.0.1:8000"', "clip = [-4, 4]"]
    assert lines[start + 1 : start + 4] == expected
