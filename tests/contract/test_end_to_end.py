"""The whole path with real parts: preference file -> train -> eval -> serve -> SDK -> best-of-n -> load."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from plaudit import Client
from plaudit_model import contract
from plaudit_model.reward_model import RewardModel

ROOT = Path(__file__).resolve().parents[2]
PLAUDIT = str(Path(sys.executable).with_name("plaudit"))


def run(*arguments: str | Path, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([PLAUDIT, *map(str, arguments)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Preferences for more `indeed`: something that a tiny model learns in seconds."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("data")
    words = ["the", "of", "and", "to", "a", "in", "is", "it", "you", "that", "he", "was", "for", "on", "are", "with",
             "as"]  # fmt: skip
    paths = folder / "train.jsonl", folder / "held-out.jsonl"
    for path, count in zip(paths, (600, 150), strict=True):
        rows = []
        for _ in range(count):
            few, many = sorted(rng.sample(range(6), 2))
            chosen, rejected = (many, few) if rng.random() < 0.9 else (few, many)  # one in ten people sees it otherwise
            texts = [" ".join(rng.sample(words, 6) + ["indeed"] * n) for n in (chosen, rejected)]
            prompt = " ".join(rng.choices(words, k=12)) + f" {rng.random()}?"
            rows.append(json.dumps({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]}))
        path.write_text("\n".join(rows) + "\n")
    return paths


@pytest.fixture(scope="module")
def trained(
    plaudit: Any, files: tuple[Path, Path], write_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    options = ["--lr", "1e-3", "--epochs", "2", "--batch-pairs", "32", "--seed", "1"]
    assert plaudit.run("train", files[0], "--base", write_base("qwen3"), "--out", out, *options) == 0, plaudit.stderr
    return out


@pytest.fixture(scope="module")
def served(trained: Path, serve: Callable[..., Any]) -> Any:
    """What was trained, behind `/score`."""
    return serve(trained / "model")


@pytest.fixture(scope="module")
def url(served: Any) -> str:
    return str(served.url)


def test_a_preference_file_becomes_a_served_score(
    plaudit: Any, files: tuple[Path, Path], trained: Path, url: str, tmp_path: Path
) -> None:
    model = trained / "model"
    assert plaudit.run("eval", model, files[1], "--json") == 0, plaudit.stderr
    evaluation = json.loads(plaudit.stdout)
    assert evaluation["accuracy"]["low"] > 0.75, evaluation["accuracy"]
    assert plaudit.run("verify", model, "--json", "--limit", "16") == 0, plaudit.stderr
    assert json.loads(plaudit.stdout)["holds"]
    assert plaudit.run("verify", model, "--against", url, "--limit", "16") == 0, plaudit.stderr
    assert "agree" in plaudit.stdout and "the server serves" not in plaudit.stderr
    with Client(url) as client:
        client.wait_until_ready()
        candidates = ["no", "indeed", "indeed indeed indeed indeed", "indeed indeed"]
        ranking = client.rank("the of and to a?", candidates)
        assert candidates[ranking.best.index] == "indeed indeed indeed indeed"
        assert client.compare("the of?", "indeed indeed indeed", "no").probability > 0.5
        direct = [float(s) for s in client.score_responses("the of and to a?", candidates).scores]
    rows, scored, offline = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "offline.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "the of and to a?", "response": c}) + "\n" for c in candidates))
    run("score", rows, "--out", scored, "--url", url)
    assert plaudit.run("score", rows, "--out", offline, "--model", model) == 0, plaudit.stderr
    for path in (scored, offline):
        assert [json.loads(line)["score"] for line in path.read_text().splitlines()] == direct


@pytest.mark.soak
def test_verify_says_first_that_the_server_has_another_model(
    trained: Path, reward_model_dir: Callable[[str], Path], serve: Callable[..., Any]
) -> None:
    url = serve(f"ours={trained / 'model'}").url
    other = reward_model_dir("qwen3")
    said = run("verify", other, "--against", url, "--limit", "16", code=1)
    theirs, mine = (contract.read(path).revision() for path in (trained / "model", other))
    assert f"the server serves ours@{theirs}" in said.stderr and f"this is {mine}" in said.stderr
    assert "DISAGREE" in said.stdout


def test_the_run_can_be_told_from_its_directory(trained: Path) -> None:
    known = json.loads(run("info", trained / "model", "--json").stdout)
    assert known["lineage"]["config"]["seed"] == 1 and known["lineage"]["versions"]["plaudit"]
    assert known["statistics"]["std"] > 0 and known["calibration"]["temperature"] > 0
    assert known["evaluation"]["accuracy"]["n"] > 0
    assert (trained / "run.toml").is_file()


def test_plain_transformers_loads_what_was_trained(trained: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(trained / "model", output_loading_info=True)
    assert not info["missing_keys"] and model.config.num_labels == 1


def metric(url: str, name: str, label: str = "") -> float:
    lines = httpx2.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{") and label in line)


def test_a_prompt_costs_once_grouped_and_nearly_so_as_single_posts(served: Any, url: str) -> None:
    """The single posts come while the model computes something else, so that no race decides who is there in time."""
    tokens, computed, waiting = "plaudit_tokens_total", 'kind="computed"', "plaudit_queue_tokens"

    def post(**body: Any) -> Any:
        return httpx2.post(f"{url}/score", json=body, timeout=60).raise_for_status().json()

    prompt, answers = "the of and to a in is it " * 15, [f"indeed {i} it was for you" for i in range(16)]
    before = metric(url, tokens, computed)
    usage = post(prompt=prompt, responses=answers)["usage"]
    grouped, one = metric(url, tokens, computed) - before, usage["prompt_tokens"] / 16
    logical, shared = usage["total_tokens"], usage["shared_tokens"]
    assert grouped == logical - shared + shared / 16, "the shared tokens of 16 items were computed once"
    assert grouped <= one + (logical - 16 * one), "the prompt once, and each response"

    with ThreadPoolExecutor(17) as clients:
        with served.standing_still():
            other = clients.submit(post, prompt="something else", response="indeed")
            while metric(url, "plaudit_queue_items") != 1 or metric(url, waiting):
                pass
            posts = [clients.submit(post, prompt="again " + prompt, response=answer) for answer in answers]
            while metric(url, "plaudit_queue_items") != 17:
                pass
        assert len({scored.result()["score"] for scored in posts}) == 16
    single = metric(url, tokens, computed) - before - grouped - other.result()["usage"]["total_tokens"]
    assert single <= 1.3 * grouped


SMOKE = ROOT / "loadtests" / "profiles" / "smoke.toml"


def load(url: str, profile: Path, seconds: int) -> tuple[int, str]:
    """The exit code of a load test, and what it says."""
    locust = [str(Path(sys.executable).with_name("locust")), "--headless", "--host", url, "--users", "3"]
    command = [*locust, "--spawn-rate", "3", "--run-time", f"{seconds}s", "--only-summary", "--load", str(profile)]
    done = subprocess.run(command, cwd=ROOT / "loadtests", capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_traffic_is_checked_and_an_objective_can_fail(url: str, tmp_path: Path) -> None:
    code, said = load(url, SMOKE, 3)
    assert code == 0, said
    text, harsh = SMOKE.read_text(), tmp_path / "harsh.toml"
    assert "items_per_second" in text
    lines = ["items_per_second = 1e9" if line.startswith("items_per_second") else line for line in text.splitlines()]
    harsh.write_text("\n".join(lines))
    code, said = load(url, harsh, 1)
    assert code == 1, said


def test_a_load_test_finds_a_model_that_scores_everything_alike(
    write_base: Callable[[str], Path], serve: Callable[..., Any], tmp_path: Path
) -> None:
    model = RewardModel.from_base(write_base("qwen3"), seed=3)
    torch.nn.init.zeros_(model.module.score.weight)
    model.save(tmp_path / "alike", model.contract)
    code, said = load(serve(tmp_path / "alike").url, SMOKE, 1)
    assert code == 1 and "different items in a row, one score" in said, said
