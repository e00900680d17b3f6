"""The real command, killed at any moment: what comes out is what would have come out."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from plaudit_model.records import Record

Toy = Callable[[int, int], list[Record]]


class Commands(Protocol):
    def start(self, *arguments: str | Path) -> int: ...
    def wait(self) -> int: ...
    def run(self, *arguments: str | Path) -> int: ...
    def stopped(self, *arguments: str | Path, out: Path, steps: int) -> int: ...
    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...


@dataclass
class Reference:
    """A run that nobody killed: its command line, its bytes, and how long it took."""

    arguments: list[str | Path]
    out: Path
    seconds: float

    def same(self, out: Path) -> bool:
        return fingerprint(out) == fingerprint(self.out)


def fingerprint(out: Path) -> dict[str, str]:
    """Losses, final weights, optimiser, generators and all files of the model by hash."""
    newest = max((out / "checkpoints").glob("step-*"))
    model = [path for path in (out / "model").iterdir() if path.name != "reward.json"]
    files = [out / "metrics.jsonl", *model, *newest.iterdir()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def reference(plaudit: Commands, write_base: Callable[[str], Path], begin: Callable[..., Reference]) -> Reference:
    return begin(plaudit, write_base("qwen3"))


@pytest.fixture(scope="module")
def lora_reference(
    plaudit: Commands, reward_model_dir: Callable[[str], Path], begin: Callable[..., Reference]
) -> Reference:
    """Adapters and head, with dropout, whose random numbers must go on where they were."""
    options = ["--lora-r", "4", "--lora-dropout", "0.1", "--lora-save", "adapter"]
    return begin(plaudit, reward_model_dir("qwen3"), *options)


@pytest.fixture(scope="module")
def begin(
    toy: Toy, as_jsonl: Callable[[Sequence[Record]], str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Reference]:
    """`begin(plaudit, base, *options)` is a run to the end."""

    def run(plaudit: Commands, base: Path, *options: str) -> Reference:
        return _reference(plaudit, tmp_path_factory.mktemp("reference"), toy, as_jsonl, base, *options)

    return run


def _reference(
    plaudit: Commands, folder: Path, toy: Toy, as_jsonl: Callable[[Sequence[Record]], str], base: Path, *options: str
) -> Reference:
    (folder / "train.jsonl").write_text(as_jsonl(toy(24, 1)))
    (folder / "eval.jsonl").write_text(as_jsonl(toy(8, 2)))
    arguments: list[str | Path] = [
        "train", folder / "train.jsonl", "--eval", folder / "eval.jsonl", "--base", base, *options,
        "--epochs", "2", "--lr", "2e-3", "--batch-pairs", "8", "--token-budget", "500", "--eval-every", "5",
        "--set", "checkpoint.every=2", "--set", "report_to=[]", "--set", "evaluation.bootstrap=20", "--resume",
    ]  # fmt: skip
    begun = time.monotonic()
    code = plaudit.run(*arguments, "--out", folder / "out")
    assert code == 0, plaudit.stderr
    return Reference(arguments, folder / "out", time.monotonic() - begun)


def lines(out: Path) -> int:
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def kill_somewhere(plaudit: Commands, reference: Reference, out: Path, draw: random.Random) -> bool:
    """Start, or resume, and kill at a random moment; True if it was running then."""
    process = plaudit.start(*reference.arguments, "--out", out)
    if draw.random() < 0.3:
        time.sleep(draw.uniform(0, reference.seconds))
    else:  # among the steps, and there at any instruction
        target = draw.randint(0, lines(reference.out) - 1)
        deadline = time.monotonic() + 20 * reference.seconds
        while lines(out) <= target and not (out / "report.json").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    return plaudit.wait() == -signal.SIGKILL


def finish_after_kills(plaudit: Commands, reference: Reference, out: Path, kills: int, draw: random.Random) -> None:
    struck = sum(kill_somewhere(plaudit, reference, out, draw) for _ in range(kills))
    assert struck, "no kill struck: this run proves nothing"
    assert plaudit.run(*reference.arguments, "--out", out) == 0, plaudit.stderr
    assert reference.same(out)


def test_kills_at_random_moments_change_no_bit(plaudit: Commands, reference: Reference, tmp_path: Path) -> None:
    finish_after_kills(plaudit, reference, tmp_path / "out", 3, random.Random(0))


def test_kills_change_no_bit_of_an_adapter(plaudit: Commands, lora_reference: Reference, tmp_path: Path) -> None:
    finish_after_kills(plaudit, lora_reference, tmp_path / "out", 2, random.Random(1))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 6))
def test_more_kills_change_no_bit(plaudit: Commands, reference: Reference, tmp_path: Path, seed: int) -> None:
    finish_after_kills(plaudit, reference, tmp_path / "out", 4, random.Random(seed))


def test_a_request_to_stop_saves_and_exits_with_75(plaudit: Commands, reference: Reference, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert plaudit.stopped(*reference.arguments, out=out, steps=5) == 75
    assert "error: SIGTERM after step" in plaudit.stderr and "--resume" in plaudit.stderr
    newest = max((out / "checkpoints").glob("step-*"))
    assert json.loads((newest / "state.json").read_text())["progress"]["metrics_bytes"] == os.path.getsize(
        out / "metrics.jsonl"
    ), "no step that is done is lost"
    assert "not finished</td><td>SIGTERM after step" in (out / "report.html").read_text()
    spoiled = Path(shutil.copytree(out, tmp_path / "spoiled"))
    assert plaudit.run(*reference.arguments, "--out", out) == 0
    assert "resumed at step" in plaudit.stdout
    assert reference.same(out)
    drawn, whole = ((folder / "report.html").read_text().split("</table>", 1)[1] for folder in (out, reference.out))
    assert drawn == whole, "the whole run, also what was before"
    log = (spoiled / "metrics.jsonl").read_bytes()
    (spoiled / "metrics.jsonl").write_bytes(b"?" + log[1:])
    assert plaudit.run(*reference.arguments, "--out", spoiled) == 0, "a page that cannot be drawn costs no run"
    assert "report.html is not drawn: JSONDecodeError" in plaudit.stdout and (spoiled / "report.json").exists()


def test_a_finished_run_is_left_as_it_is(plaudit: Commands, reference: Reference) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(reference.out.rglob("*")) if path.is_file()}
    assert plaudit.run(*reference.arguments, "--out", reference.out) == 0
    assert "is finished" in plaudit.stdout
    assert {path: path.stat().st_mtime_ns for path in sorted(reference.out.rglob("*")) if path.is_file()} == before


def test_resuming_needs_only_the_directory(plaudit: Commands, reference: Reference, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = plaudit.start(*reference.arguments, "--out", out)
    while lines(out) < 3:
        time.sleep(0.001)
    with suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    plaudit.wait()
    assert plaudit.run("train", "--resume", "--out", out) == 0, plaudit.stderr
    assert reference.same(out)


def test_the_configuration_that_a_run_leaves_is_the_run(
    plaudit: Commands, reference: Reference, tmp_path: Path
) -> None:
    code = plaudit.run("train", "--config", reference.out / "run.toml", "--out", tmp_path / "again")
    assert code == 0, plaudit.stderr
    assert reference.same(tmp_path / "again")
