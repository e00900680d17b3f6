"""`plaudit bon score`: one request a prompt, one revision a file, and kill -9 at any moment."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import WireServer

Bon = Callable[..., tuple[int, str, str]]
Write = Callable[..., str]
Read = Callable[[str], list[dict[str, Any]]]
N = 4
CONCURRENCY = 3


def sent(server: WireServer) -> list[dict[str, Any]]:
    """The items of every scoring request."""
    return [item for seen in server.seen if seen.path == "/score" and seen.body for item in seen.body["items"]]


def test_the_samples_of_a_prompt_go_in_one_request(
    server: WireServer, bon: Bon, write: Write, read: Read, samples: Any
) -> None:
    rows = samples(5, N)
    code, _, err = bon("score", write("s.jsonl", rows), "--out", "o.jsonl", "--url", server.url)
    scored = read("o.jsonl")
    assert code == 0 and err == "20 rows, 0 failed, 0 from an earlier run by tiny@rev1\n"
    expected = [{"prompt": f"prompt {p}", "responses": [f"answer {i} to {p}" for i in range(N)]} for p in range(5)]
    assert sorted(sent(server), key=lambda item: item["prompt"]) == expected
    assert [{key: row[key] for key in rows[0]} for row in scored] == rows
    assert [row["score"] for row in scored] == [server.score_of(row["prompt"], row["response"]) for row in rows]
    about = scored[0]["plaudit"]
    assert (about["revision"], about["numerics"], about["overlong"]) == ("rev1", "exact/float32/torch/cpu", "error")


def test_what_has_no_score_says_why(server: WireServer, bon: Bon, write: Write, read: Read, samples: Any) -> None:
    rows = samples(2, 3)
    rows[1]["response"] = "POISON"
    rows[2] = {**rows[2], "response": None, "failure": {"code": "no_content", "message": "the choice holds no text"}}
    rows[3]["response"] = 7
    rows[4]["messages"] = []
    code, out, _ = bon("score", write("s.jsonl", rows), "--out", "o.jsonl", "--url", server.url, "--json")
    scored = read("o.jsonl")
    assert code == 1 and json.loads(out)["failed"] == 4 and len(scored) == 6
    assert [row["score"] is None for row in scored] == [False, True, True, True, True, False]
    codes = [row["error"]["code"] for row in scored if row["score"] is None]
    assert codes == ["too_long", "not_generated", "bad_row", "bad_row"]
    asked = len(server.seen)
    assert bon("score", "s.jsonl", "--out", "o.jsonl", "--url", server.url)[0] == 1
    assert [seen.path for seen in server.seen[asked:]] == ["/info"]  # nothing is scored twice


def test_a_second_model_beside_the_first(server: WireServer, bon: Bon, write: Write, read: Read, samples: Any) -> None:
    bon("score", write("s.jsonl", samples(2, 2)), "--out", "one.jsonl", "--url", server.url)
    server.identity["revision"] = "rev2"
    assert bon("score", "one.jsonl", "--out", "two.jsonl", "--url", server.url)[0] == 65
    assert bon("score", "one.jsonl", "--out", "two.jsonl", "--url", server.url, "--prefix", "gold_")[0] == 0
    row = read("two.jsonl")[0]
    assert row["plaudit"]["revision"] == "rev1" and row["gold_plaudit"]["revision"] == "rev2"
    assert bon("report", "two.jsonl", "--gold", "gold_score", "--resamples", "5")[0] == 0


def test_another_revision_stops_the_run(server: WireServer, bon: Bon, write: Write, read: Read, samples: Any) -> None:
    source = write("s.jsonl", samples(6, 2))
    arguments = ("score", source, "--out", "o.jsonl", "--url", server.url, "--concurrency", "1")

    def swapped(answer: dict[str, Any]) -> dict[str, Any]:
        return {**answer, "revision": "rev2"}

    server.fail({}, {}, {"change": swapped})
    code, _, err = bon(*arguments)
    assert code == 78 and "the rows before were scored by tiny@rev1" in err and "tiny@rev2" in err
    assert len(read("o.jsonl")) == 4  # what was scored before is kept
    server.identity["numerics"] = "fast/bfloat16/torch/cpu"
    assert bon(*arguments)[0] == 78 and len(read("o.jsonl")) == 4
    server.identity["numerics"] = "exact/float32/torch/cpu"
    assert bon(*arguments)[0] == 0 and len(read("o.jsonl")) == 12
    other = ("score", source, "--out", "other.jsonl", "--url", server.url, "--concurrency", "1")
    assert bon(*other, "--revision", "rev0")[0] == 78


def test_a_key_that_is_there_twice(server: WireServer, bon: Bon, write: Write, samples: Any) -> None:
    rows = samples(1, 2)
    code, _, err = bon("score", write("s.jsonl", [*rows, rows[0]]), "--out", "o.jsonl", "--url", server.url)
    assert code == 65 and "line 3 repeats the key" in err and not sent(server) and not Path("o.jsonl").exists()


def test_rows_without_keys_are_scored_too(server: WireServer, bon: Bon, write: Write, read: Read) -> None:
    rows = [{"prompt": "p", "response": "same"}] * 3
    assert bon("score", write("s.jsonl", rows), "--out", "o.jsonl", "--url", server.url)[0] == 0
    assert len({row["score"] for row in read("o.jsonl")}) == 1 and len(read("o.jsonl")) == 3


def test_a_file_that_is_being_written_is_left_alone(server: WireServer, bon: Bon, write: Write, samples: Any) -> None:
    import fcntl

    source = write("s.jsonl", samples(1, 1))
    with Path("o.jsonl").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, err = bon("score", source, "--out", "o.jsonl", "--url", server.url)
    assert code == 65 and "is being written by another run" in err


PER_KILL = 10
"""Prompts for each kill: more than one run can have answered, so that no kill comes too late on a fast machine."""


def killed_at_random(server: WireServer, tmp_path: Path, rows: list[dict[str, Any]], kills: int) -> None:
    """Kill the command so often, each time after a random number of further requests and a random moment more."""
    source, out = tmp_path / "s.jsonl", tmp_path / "o.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "-c", "from plaudit.bon.cli import app; app()", "score", str(source)]
    command += ["--url", server.url, "--concurrency", str(CONCURRENCY), "--out"]
    subprocess.run([*command, str(tmp_path / "whole.jsonl")], check=True, capture_output=True)
    whole, chance = (tmp_path / "whole.jsonl").read_bytes(), random.Random(kills)
    server.seen.clear()
    server.hold = 0.004
    for _ in range(kills):
        wanted = chance.randint(0, PER_KILL - 2 * CONCURRENCY)
        stop = len(server.seen) + wanted
        server.quota = wanted + 2 * CONCURRENCY
        process = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL)
        while process.poll() is None and len(server.seen) < stop:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        there = out.read_bytes() if out.exists() else b""
        assert whole.startswith(there)  # a prefix of the result at every moment, a torn last line at most
        if chance.random() < 0.3:
            out.write_bytes(there[: max(0, len(there) - chance.randint(0, 40))])  # as if the last write had been torn
    server.quota = math.inf
    assert subprocess.run([*command, str(out)], check=False, capture_output=True).returncode == 0
    assert out.read_bytes() == whole
    keys = [json.loads(line)["key"] for line in out.read_text().splitlines()]
    assert len(keys) == len(set(keys)) == len(rows)
    scored = sum(len(item["responses"]) for item in sent(server))
    print(f"{kills} kills, {len(rows)} rows, {scored - len(rows)} scored again")
    assert scored <= len(rows) + kills * (CONCURRENCY + 1) * N  # the window in flight, and the group that was torn


def test_kill_9_at_random_moments(server: WireServer, tmp_path: Path, samples: Any) -> None:
    killed_at_random(server, tmp_path, samples(PER_KILL * 8, N), kills=8)


@pytest.mark.soak
def test_kill_9_a_hundred_times(server: WireServer, tmp_path: Path, samples: Any) -> None:
    killed_at_random(server, tmp_path, samples(PER_KILL * 100, N), kills=100)
