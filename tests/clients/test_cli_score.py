"""`plaudit score`, `rank` and `compare` as they are typed, against a real server."""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from plaudit import _scorers, cli
from plaudit._extras import install

if TYPE_CHECKING:
    from conftest import WireServer

ENTRIES = {
    verb: EntryPoint(verb, f"plaudit.cli_score:{verb}", cli.GROUP) for verb in ("wait", "score", "rank", "compare")
}
ROWS = [
    {"id": 1, "prompt": "p", "response": "abc"},
    {"id": 2, "prompt": "p", "responses": ["a", "POISON", "ccc"]},
    {"id": 3, "question": "no item"},
    {"id": 4, "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]},
]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`run(*args)` is (exit code, standard output, standard error), in an empty current directory."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> tuple[int, str, str]:
        code = cli.run(args, ENTRIES)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def write_rows(rows: list[dict[str, Any]], name: str = "in.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def read_rows(name: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def many(count: int) -> list[dict[str, Any]]:
    return [{"prompt": "p", "response": f"response {n}"} for n in range(count)]


def test_rows_are_scored_and_bad_ones_named(server: WireServer, run: Callable[..., Any]) -> None:
    code, out, err = run("score", write_rows(ROWS), "--out", "out.jsonl", "--url", server.url)
    first, second, third, fourth = read_rows()
    assert code == 1 and out == ""
    assert first["score"] == server.score_of("p", "abc") and first["id"] == 1
    assert second["scores"] == [server.score_of("p", "a"), None, server.score_of("p", "ccc")]
    assert second["errors"][1]["code"] == "too_long" and third["error"]["code"] == "bad_row"
    assert fourth["score"] == server.score_of([{"role": "user", "content": "p"}], "r")
    assert fourth["plaudit"]["revision"] == "rev1"
    assert "line 2: too_long: 9 tokens too many" in err and "line 3: bad_row: has the fields ['id', 'question']" in err
    assert "4 rows, 2 failed, 0 from an earlier run by tiny@rev1" in err
    assert server.seen[-1].body is not None and server.seen[-1].body["priority"] == "batch"


def test_a_second_run_scores_only_what_is_missing(server: WireServer, run: Callable[..., Any]) -> None:
    source = write_rows(many(40))
    assert run("score", source, "--out", "whole.jsonl", "--url", server.url)[0] == 0
    whole = Path("whole.jsonl").read_bytes()
    Path("out.jsonl").write_bytes(whole[: len(whole) // 2])
    before = len(server.seen)
    code, out, _ = run("score", source, "--out", "out.jsonl", "--url", server.url, "--batch", "8", "--json")
    assert code == 0 and Path("out.jsonl").read_bytes() == whole
    earlier = whole[: len(whole) // 2].count(b"\n")
    sent = [seen.body["items"] for seen in server.seen[before:] if seen.body]
    assert sum(map(len, sent)) == 40 - earlier and max(map(len, sent)) == 8
    identity = {"model": "tiny", "revision": "rev1", "numerics": "exact/float32/torch/cpu"}
    assert json.loads(out) == {"rows": 40, "failed": 0, "earlier": earlier, "identity": identity}


def test_a_file_that_is_being_written_is_left_alone(server: WireServer, run: Callable[..., Any]) -> None:
    source = write_rows(many(3))
    with Path("out.jsonl").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, err = run("score", source, "--out", "out.jsonl", "--url", server.url)
    assert code == 65 and "is being written by another run" in err and not server.seen
    assert run("score", source, "--out", "out.jsonl", "--url", server.url)[0] == 0 and len(read_rows()) == 3


def test_a_file_of_another_model_is_not_continued(server: WireServer, run: Callable[..., Any]) -> None:
    source = write_rows(many(3))
    run("score", source, "--out", "out.jsonl", "--url", server.url)
    server.identity["revision"] = "rev2"
    code, _, err = run("score", source, "--out", "out.jsonl", "--url", server.url)
    assert code == 78 and err.startswith("error: the rows before were scored by tiny@rev1")


def test_a_file_of_other_rows_is_not_continued(server: WireServer, run: Callable[..., Any]) -> None:
    run("score", write_rows(many(3)), "--out", "out.jsonl", "--url", server.url)
    code, _, err = run("score", write_rows(ROWS), "--out", "out.jsonl", "--url", server.url)
    assert code == 65 and "out.jsonl:1 was not made from the row in its place" in err


def test_a_server_that_goes_away_leaves_a_file_that_can_be_taken_up(
    server: WireServer, run: Callable[..., Any]
) -> None:
    source = write_rows(many(20))
    args = ("score", source, "--out", "out.jsonl", "--url", server.url, "--batch", "5", "--concurrency", "1")
    server.fail({}, {"status": 400, "body": {"error": {"code": "odd", "message": "stop"}}})
    code, _, err = run(*args)
    assert code == 65 and "odd: stop" in err and len(read_rows()) == 5
    server.fail({}, {"status": 500, "body": {"error": {"code": "bug", "message": "no", "retryable": False}}})
    code, _, err = run(*args)
    assert code == 69 and "not everything could be scored: bug" in err and len(read_rows()) == 10
    assert all(row["score"] is not None for row in read_rows())
    assert run(*args)[0] == 0 and [row["response"] for row in read_rows()] == [row["response"] for row in many(20)]


def test_a_server_that_is_restarted_is_waited_for(
    server: WireServer, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plaudit._client.time.sleep", lambda seconds: None)
    server.fail(*[{"status": 503, "body": {}}] * 40)
    assert run("score", write_rows(many(3)), "--out", "out.jsonl", "--url", server.url)[0] == 0
    assert len(read_rows()) == 3 and not server.faults


def test_standard_input_and_output(
    server: WireServer, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Standard:
        buffer = io.BytesIO(b'{"prompt": "p", "response": "abc"}\n')

    monkeypatch.setattr(sys, "stdin", Standard())
    code, out, err = run("score", "-", "--url", server.url, "--json")
    assert code == 0 and json.loads(out)["score"] == server.score_of("p", "abc")
    assert json.loads(err)["rows"] == 1


def test_the_environment_and_the_file_name_the_server(
    server: WireServer, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(many(1))
    code, _, err = run("score", source)
    assert code == 78 and "pass --url (or set PLAUDIT_URL), or --model with a directory" in err
    monkeypatch.setenv("PLAUDIT_URL", server.url)
    assert run("score", source)[0] == 0
    monkeypatch.delenv("PLAUDIT_URL")
    Path("plaudit.toml").write_text(f'[score]\nurl = "{server.url}"\nprefix = "rm_"\n')
    assert json.loads(run("score", source)[1])["rm_score"] == server.score_of("p", "response 0")


def test_what_cannot_be_read_or_written_is_one_line(server: WireServer, run: Callable[..., Any]) -> None:
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in many(9)).encode())
    Path("in.jsonl.gz").write_bytes(whole[:-12])
    code, _, err = run("score", "in.jsonl.gz", "--url", server.url)
    assert code == 65 and err.startswith("error: the input cannot be read to its end: Compressed file ended")
    assert run("rank", "--file", "in.jsonl.gz", "--url", server.url)[0] == 65
    code, _, err = run("score", write_rows(many(9)), "--out", "/dev/full", "--url", server.url)
    assert code == 74 and err.startswith("error: /dev/full cannot be written any further: No space left")


def test_a_full_standard_output_is_exit_74(server: WireServer, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(many(1)[0]), encoding="utf-8")
    code = "from plaudit.cli import main; main()"
    command = [sys.executable, "-c", code, "score", str(tmp_path / "in.jsonl"), "--url", server.url]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (74, 1) and "No space left" in done.stderr


def test_a_field_of_the_row_is_kept(server: WireServer, run: Callable[..., Any]) -> None:
    code, _, err = run("score", write_rows([{"text": "a", "score": 1}]), "--url", server.url)
    assert code == 65 and "--prefix" in err


def test_an_interrupted_run_is_quiet_and_can_be_taken_up(server: WireServer, tmp_path: Path) -> None:
    rows, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in many(20)), encoding="utf-8")
    server.fail({}, {"delay": 300.0})
    code = "import sys; from plaudit.cli import main; main()"
    args = ["score", str(rows), "--out", str(out), "--url", server.url, "--batch", "10", "--concurrency", "1"]
    process = subprocess.Popen([sys.executable, "-c", code, *args], stderr=subprocess.PIPE, text=True)
    while server.paths().count("/score") < 2 or out.read_bytes().count(b"\n") < 10:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 130
    assert len(out.read_bytes().splitlines()) == 10


def test_wait_returns_when_the_server_is_ready_and_not_before_its_time_is_up(
    server: WireServer, run: Callable[..., Any]
) -> None:
    server.fail(*[{"status": 503, "body": {"error": {"code": "unavailable", "message": "loading"}}}] * 2)
    assert run("wait", "--url", server.url)[0] == 0 and server.paths() == ["/readyz"] * 3
    code, _, err = run("wait", "--url", "http://127.0.0.1:9", "--timeout", "0.1")
    assert code == 69 and "not ready after" in err


def test_rank_sorts(server: WireServer, run: Callable[..., Any]) -> None:
    code, out, _ = run("rank", "--prompt", "p", "a", "bbbb", "cc\ndd", "--url", server.url, "--top-n", "2")
    assert code == 0 and [line.split()[-1] for line in out.splitlines()] == ["dd", "bbbb"]
    assert out.splitlines()[0].split()[0] == "1" and "[2] cc dd" in out
    item = {"prompt": [{"role": "user", "content": "p"}], "responses": ["a", "bb"]}
    Path("one.json").write_text(json.dumps(item, indent=2))
    code, out, _ = run("rank", "--file", "one.json", "--url", server.url, "--json")
    found = json.loads(out)
    assert code == 0 and [result["index"] for result in found["results"]] == [1, 0]
    assert found["identity"]["revision"] == "rev1"


def test_rank_names_what_it_could_not_score(server: WireServer, run: Callable[..., Any]) -> None:
    code, out, err = run("rank", "--prompt", "p", "a", "POISON", "--url", server.url)
    assert code == 1 and "[0] a" in out and "response 1: too_long" in err


@pytest.mark.parametrize("text", ["{", '{"prompt": "p"}', '{"prompt": "p", "response": "r"}', "[]", ""])
def test_rank_needs_a_prompt_and_responses(server: WireServer, run: Callable[..., Any], text: str) -> None:
    Path("one.json").write_text(text)
    code, _, err = run("rank", "--file", "one.json", "--url", server.url)
    assert code == 65 and "a JSON object with prompt and responses is needed" in err
    assert run("rank", "--url", server.url)[0] == run("rank", "--prompt", "p", "--url", server.url)[0] == 2


def test_compare_says_which_is_better(server: WireServer, run: Callable[..., Any]) -> None:
    code, out, _ = run("compare", "aaa", "b", "--prompt", "p", "--url", server.url)
    assert code == 0 and out.startswith("A is better: score(A) - score(B) = +") and "P(A better) = 0.7500" in out
    assert run("compare", "b", "aaa", "--prompt", "p", "--url", server.url)[1].startswith("B is better")
    found = json.loads(run("compare", "aaa", "b", "--prompt", "p", "--url", server.url, "--json")[1])
    assert found["probability"] == 0.75 and found["margin"] == server.score_of("p", "aaa") - server.score_of("p", "b")


class HomeModel:
    """A local scorer as another package would bring it: longer is better."""

    opened: list[tuple[str, str]] = []
    broken = False
    temperature: float | None = 2.0

    def __init__(self, model: str, overlong: str) -> None:
        self.opened.append((model, overlong))

    def info(self) -> dict[str, Any]:
        return {"model": "home", "revision": "h1", "numerics": "n", "temperature": self.temperature}

    def score_items(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        texts = [text for item in items for text in item.get("responses", [item.get("response", "")])]
        scores = [float("nan") if self.broken else float(len(text)) for text in texts]
        return [{"index": n, "score": score, "tokens": 1} for n, score in enumerate(scores)]


@pytest.fixture
def home_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model directory, and a local scorer that opens it."""
    entry = EntryPoint("home", f"{__name__}:HomeModel", _scorers.LOCAL_GROUP)
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[HomeModel.__module__])
    monkeypatch.setattr(_scorers, "entry_points", lambda group: [entry])
    (tmp_path / "model").mkdir()
    return str(tmp_path / "model")


def test_a_model_directory_is_scored_without_a_server(
    home_model: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAUDIT_URL", "http://127.0.0.1:9")  # a directory that is named counts more
    options = ("--out", "out.jsonl", "--model", home_model, "--overlong", "truncate_prompt", "--batch", "2")
    assert run("score", write_rows(many(3)), *options)[0] == 0
    assert [row["score"] for row in read_rows()] == [10.0] * 3
    assert read_rows()[0]["plaudit"]["revision"] == "h1" and HomeModel.opened[-1] == (home_model, "truncate_prompt")
    assert run("rank", "--prompt", "p", "a", "bb", "--model", home_model)[1].splitlines()[0].endswith("[1] bb")
    code, _, err = run("score", write_rows(many(3)), "--model", home_model, "--revision", "h0")
    assert code == 78 and "home is revision h1, not h0" in err


def test_a_local_comparison_needs_the_models_temperature(
    home_model: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads(run("compare", "aaaa", "bb", "--prompt", "p", "--model", home_model, "--json")[1])
    assert found["margin"] == 2.0 and found["probability"] == pytest.approx(1 / (1 + 2.718281828459045**-1.0))
    assert run("compare", "a", "b", "--prompt", "p", "--model", home_model)[1].startswith("neither is better")
    monkeypatch.setattr(HomeModel, "temperature", None)
    code, _, err = run("compare", "a", "b", "--prompt", "p", "--model", home_model)
    assert code == 78 and "home has no fitted temperature" in err


def test_a_local_score_that_is_no_number_stops_the_run(
    home_model: str, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HomeModel, "broken", True)
    code, _, err = run("score", write_rows(many(1)), "--model", home_model)
    assert code == 69 and "must be a finite number, got nan" in err


def test_without_a_local_scorer_the_extra_is_named(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = EntryPoint("torch", "no_such_library.local:open_scorer", _scorers.LOCAL_GROUP)
    for found in ([], [missing]):
        monkeypatch.setattr(_scorers, "entry_points", lambda group, found=found: found)
        code, _, err = run("score", write_rows(many(1)), "--model", str(tmp_path))
        assert code == 78 and install("model") in err


@pytest.mark.parametrize("verb", ["rank", "compare", "score"])
def test_an_answer_that_never_comes_costs_an_attempt(server: WireServer, run: Callable[..., Any], verb: str) -> None:
    server.fail({"delay": 30.0})
    Path("in.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    what = ("in.jsonl", "--out", "o") if verb == "score" else ("a", "bb", "--prompt", "p")
    limits = ("--timeout", "0", "--attempt-timeout", "0.3")
    assert run(verb, *what, "--url", server.url, *limits)[0] == 0
    assert server.paths().count("/compare" if verb == "compare" else "/score") >= 2  # a good one may come late as well
