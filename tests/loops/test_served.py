"""Against real served reward models: a short PPO, an ensemble, a model that changes, items that cannot be scored."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from plaudit import Client, Overloaded, RevisionChanged
from plaudit import _trees as trees
from plaudit_loops import loop, starter, verbs
from plaudit_loops.config import RewardConfig, RlConfig, SftConfig
from plaudit_loops.scoring import Served
from plaudit_loops.world import World


@pytest.fixture(scope="module")
def served(served_url: Callable[[str], str]) -> str:
    return served_url("qwen3")


@pytest.fixture(scope="module")
def other(served_url: Callable[[str], str]) -> str:
    return served_url("llama")


@pytest.fixture
def source() -> Iterator[Callable[..., Served]]:
    made: list[Served] = []

    def connect(*urls: str, **options: Any) -> Served:
        made.append(Served(urls, RewardConfig(**options)))
        made[-1].connect()
        return made[-1]

    yield connect
    for one in made:
        one.close()


def test_scores_are_those_of_the_server(served: str, other: str, source: Callable[..., Served]) -> None:
    groups = [("what is it?", ["a language", ""]), ([{"role": "user", "content": "learn"}], ["daily"])]
    promises = [source(served, other).submit(groups), source(other).submit(groups)]
    both, one = promises[0](), promises[1]()
    assert both.shape == (2, 3)
    with Client(served) as client:
        items = [{"prompt": prompt, "responses": texts} for prompt, texts in groups]
        assert both[0].tolist() == client.score_items(items).scores
    assert (both[1] == one[0]).all()


def test_a_changed_revision_raises_or_is_counted(served: str, other: str, source: Callable[..., Served]) -> None:
    first = source(served)
    for options in ({}, {"pin": False}):
        moved = source(other, **options)
        if not options:
            with pytest.raises(RevisionChanged, match="not as .* any more"):
                moved.put_back(first.state())
            continue
        moved.put_back(first.state())
        assert moved.counts()["reward/revision_changes"] == 1
        assert moved.submit([("a", ["b"])])().shape == (1, 1)
    with pytest.raises(RevisionChanged, match="began with 1 endpoints"):
        source(served, other).put_back(first.state())


def test_an_item_that_cannot_be_scored_is_no_number(served: str, source: Callable[..., Served]) -> None:
    groups = [("a", ["fine", "practise " * 700])]
    with pytest.raises(Exception, match="too_long"):
        source(served).submit(groups)()
    lenient = source(served, on_error="none")
    scores = lenient.submit(groups)()
    assert scores[0, 0] == scores[0, 0] and scores[0, 1] != scores[0, 1]
    assert lenient.counts()["reward/failed"] == 1 and lenient.counts()["reward/failed"] == 0


def test_a_response_that_may_become_too_long_is_said_before_it_does(
    served: str, source: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    source(served).expect(512)
    source(served, overlong="truncate_prompt").expect(513)
    assert not caplog.messages
    source(served).expect(513)
    assert "responses have up to 513 tokens, but" in caplog.messages[0] and "reads at most 512" in caplog.messages[0]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_that_goes_on_waits_for_a_server_that_comes_back_too(
    resumed: bool, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped URL is an error at once; but where a run had scores, both may have been reclaimed together."""

    class Returning(BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self) -> None:
            Returning.asked += 1
            known = {"model": "m", "revision": "r", "numerics": "n", "limits": {"max_items": 1, "max_body_bytes": 9}}
            body = json.dumps(known).encode()
            self.send_response(503 if Returning.asked < 9 else 200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *about: Any) -> None: ...

    monkeypatch.setattr("plaudit._client.time.sleep", lambda seconds: None)
    if resumed:
        (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    place = loop.Place(tmp_path, quiet, World("cpu"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Returning) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = RlConfig(reward=RewardConfig(url=(f"http://127.0.0.1:{server.server_port}",)))
        try:
            if resumed:
                verbs._served(config, place).close()
            else:
                with pytest.raises(Overloaded, match="4 attempts"):
                    verbs._served(config, place)
        finally:
            server.shutdown()


def test_a_server_that_is_silent_is_left_without_waiting(source: Callable[..., Served]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        served = Served([f"http://127.0.0.1:{silent.getsockname()[1]}"], RewardConfig(timeout=0))
        served.submit([("a", ["b"])])
        connection, _ = silent.accept()
        leaving = threading.Thread(target=served.close, daemon=True)
        leaving.start()
        leaving.join(60)
        assert not leaving.is_alive(), "close waits for an answer that does not come"
        assert all(one.daemon for one in threading.enumerate() if one.name.startswith("plaudit")), "so does the exit"
        connection.close()


def command(*arguments: str | Path) -> list[str]:
    verb = (
        "from plaudit_loops import cli; import typer; app = typer.Typer(); app.command()(getattr(cli, sys.argv.pop(1)))"
    )
    return [sys.executable, "-P", "-c", f"import sys; {verb}; app()", *map(str, arguments)]


def run(*arguments: str | Path) -> str:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def two_processes(*arguments: str | Path) -> list[subprocess.Popen[str]]:
    """The command as `torchrun --nproc-per-node 2` starts it."""
    port, both = str(20_000 + os.getpid() % 20_000), []
    for rank in ("0", "1"):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port,
                 "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}  # fmt: skip
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        both.append(subprocess.Popen(command(*arguments), env={**os.environ, **world}, **pipes))
    return both


@pytest.mark.soak
def test_a_signal_to_one_of_two_processes_stops_both_with_everything_saved(tmp_path: Path) -> None:
    options = ["--starter-records", "64", "--epochs", "500", "--batch-size", "4", "--device", "cpu"]
    both = two_processes("sft", "starter", *options, "--out", tmp_path / "out")
    metrics = tmp_path / "out/metrics.jsonl"
    while both[0].poll() is None and not (metrics.exists() and metrics.stat().st_size):
        os.sched_yield()
    both[1].send_signal(signal.SIGTERM)  # the one that does not save
    for process in both:
        _, errors = process.communicate(timeout=600)
        assert "Interrupted: SIGTERM after step" in errors, errors
    (saved,) = (tmp_path / "out/checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) == len(metrics.read_text().splitlines())


@pytest.mark.soak
def test_from_nothing_to_a_policy_by_command(served: str, tmp_path: Path) -> None:
    """The verbs as they are typed: sft from scratch, a few steps of PPO, the same run again from its run.toml."""
    small = ["--report-to", "tensorboard", "--checkpoint-every", "2"]
    run("sft", "starter", "--starter-records", "64", "--out", tmp_path / "sft", *small)
    options = ["--url", served, "--starter-prompts", "24", "--steps", "4", "--prompts-per-step", "8", *small]
    options += ["--max-new-tokens", "12", "--minibatches", "2", "--value-warmup-steps", "1", "--sample-every", "2"]
    said = run("rl", "--policy", tmp_path / "sft/policy", *options, "--out", tmp_path / "rl")
    assert f"scored by {served}" in said and f"policy: {tmp_path / 'rl/policy'}" in said
    lines = [json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["reward/failed"] == 0 and line["objective/scores"] is not None for line in lines)
    samples = [json.loads(line) for line in (tmp_path / "rl/samples.jsonl").read_text().splitlines()]
    with Client(served) as client:
        for sample in samples:
            assert client.score(sample["prompt"], sample["response"]).score == sample["scores"][0]
    assert list((tmp_path / "rl/tensorboard").glob("*tfevents*"))
    run("rl", "--config", tmp_path / "rl/run.toml", "--out", tmp_path / "again")
    assert (tmp_path / "again/metrics.jsonl").read_bytes() == (tmp_path / "rl/metrics.jsonl").read_bytes()
    assert "is finished" in run("rl", "--resume", "--out", tmp_path / "rl")


@pytest.mark.soak
@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_two_processes_compute_what_one_does(served: str, tmp_path: Path, quiet: Console, algo: str) -> None:
    base = tmp_path / "base"
    starter.write_policy(base, 0)
    small = trees.changed(
        SftConfig(), {"data": ["starter"], "starter_records": 64, "model.policy": str(base), "run.report_to": []}
    )
    verbs.sft(small, tmp_path / "sft", quiet)
    options = [
        "--policy", tmp_path / "sft/policy", "--url", served, "--algo", algo, "--steps", "4", "--device", "cpu",
        "--prompts-per-step", "4", "--group-size", "4", "--max-new-tokens", "8", "--starter-prompts", "24",
        "--value-warmup-steps", "1", "--learning-rate", "1e-4", "--minibatches", "2",
    ]  # fmt: skip
    run("rl", *options, "--out", tmp_path / "one")
    for process in two_processes("rl", *options, "--out", tmp_path / "two"):
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                for name in ("one", "two"))  # fmt: skip
    for a, b in zip(one, two, strict=True):
        for name, value in a.items():
            assert b[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (a["step"], name)
    stored = trees.read(tmp_path / "two/run.toml", RlConfig)
    assert stored.steps == 4
