"""The loop on tiny models: it learns, it skips what is not finite, it stops early, it forgets nothing."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from plaudit import _trees as trees
from plaudit_model import checkpoint
from plaudit_model.checkpoint import Snapshot
from plaudit_model.interrupt import Interrupted, StopRequest
from plaudit_model.json_lines import JsonLines
from plaudit_model.progress import Trackers
from plaudit_model.records import Record
from plaudit_model.reward_model import RewardModel
from plaudit_model.run_folder import Diverged
from plaudit_training import state
from plaudit_training.batches import Example, encode_records
from plaudit_training.config import RunConfig
from plaudit_training.evaluate import evaluate
from plaudit_training.report import Display
from plaudit_training.state import module_tensors
from plaudit_training.trackers import make
from plaudit_training.train import Outlets, Task, Trainer

Toy = Callable[[int, int], list[Record]]
WriteBase = Callable[[str], Path]
SMALL: dict[str, Any] = {
    "optim.learning_rate": 2e-3, "optim.batch_pairs": 16, "optim.token_budget": 1500, "checkpoint.every": 3,
    "model.dtype": "float32", "report_to": [], "evaluation.bootstrap": 20,
}  # fmt: skip


def settings(**changes: object) -> RunConfig:
    return trees.changed(RunConfig(), SMALL | {name.replace("__", "."): v for name, v in changes.items()})


@pytest.fixture(scope="module")
def make_task(write_base: WriteBase, toy: Toy) -> Callable[..., Task]:
    """`make_task(config, family)` is a fresh model with training and held-out examples."""

    def build(config: RunConfig, family: str = "qwen3", records: int = 24) -> Task:
        model = RewardModel.from_base(write_base(family), seed=config.seed, device="cpu")
        train, held_out = (encode_records(toy(n, seed), model.encoder).examples for n, seed in ((records, 1), (12, 2)))
        return Task(model, train, held_out, config, "data")

    return build


class StopAt(StopRequest):
    """A request to stop that comes at the n-th time it is asked for."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def check(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted("SIGTERM")


def run(task: Task, out: Path, stop: StopRequest | None = None, trackers: Trackers | None = None) -> Trainer:
    """Train into `out`, from its newest checkpoint if there is one."""
    out.mkdir(exist_ok=True)
    trainer = Trainer(task, out)
    trainer.resume()
    log = JsonLines(out / "metrics.jsonl", trainer.progress.metrics_bytes)
    try:
        with Display(Console(file=StringIO()), task.steps, trainer.progress.step) as display:
            trainer.run(Outlets(log, trackers or make((), out, {}, 0), display, stop or StopRequest()))
    finally:
        log.close()
    return trainer


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def weights(task: Task) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in module_tensors(task.model.module).items()}


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "float32"), ("qwen3", "bfloat16"), ("bert", "float32")])
def test_a_run_of_seconds_learns_the_toy(
    make_task: Callable[..., Task], tmp_path: Path, family: str, dtype: str
) -> None:
    task = make_task(settings(optim__num_train_epochs=3, model__dtype=dtype), family, records=50)
    before = evaluate(task.model, task.held_out, token_budget=4096, bootstrap=0).metrics
    trainer = run(task, tmp_path)
    after = evaluate(task.model, task.held_out, token_budget=4096, bootstrap=300).metrics
    steps = events(tmp_path, "step")
    assert trainer.progress.step == task.steps == len(steps)
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert after["accuracy"].low is not None and after["accuracy"].low > 0.7, "beats chance beyond its interval"
    assert after["nll"].value is not None and before["nll"].value is not None
    assert after["nll"].value < before["nll"].value
    assert all(p.dtype == torch.float32 for p in task.model.module.parameters()), "the master weights are fp32"


def test_metrics_say_what_each_step_was(whole: Whole) -> None:
    task = whole.task
    steps, evaluations = events(whole.out, "step"), events(whole.out, "evaluation")
    assert [event["step"] for event in steps] == list(range(1, task.steps + 1))
    assert [event["step"] for event in evaluations] == list(range(2, task.steps + 1, 2))
    assert sum(event["comparisons"] for event in steps) == sum(example.pairs for example in task.train)
    assert sum(event["tokens"] for event in steps) == sum(example.tokens for example in task.train)
    assert all(event["packed_tokens"] < event["tokens"] for event in steps), "prompts are shared"
    assert steps[-1]["learning_rate"] == pytest.approx(2e-4), "the floor of the cosine"


def test_the_token_budget_does_not_change_what_is_learned(make_task: Callable[..., Task], tmp_path: Path) -> None:
    losses = []
    for budget in (300, 100_000):
        run(make_task(settings(optim__token_budget=budget)), tmp_path / str(budget))
        losses.append([event["loss"] for event in events(tmp_path / str(budget), "step")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@dataclass
class Whole:
    """A run from beginning to end, which others are compared with."""

    config: RunConfig
    task: Task
    out: Path

    def is_same(self, task: Task, out: Path) -> bool:
        """Weights and metrics.jsonl, every bit."""
        same_lines = (self.out / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()
        return same_lines and weights(self.task) == weights(task)


@pytest.fixture(scope="module")
def whole(make_task: Callable[..., Task], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    config = settings(evaluation__every=2, checkpoint__every=1, optim__token_budget=700)
    task, out = make_task(config), tmp_path_factory.mktemp("whole")
    run(task, out)
    return Whole(config, task, out)


@pytest.mark.parametrize("stop_at", [1, 4, 7, 8, 9])
def test_a_run_that_gives_way_goes_on_bit_by_bit(
    make_task: Callable[..., Task], tmp_path: Path, whole: Whole, stop_at: int
) -> None:
    with pytest.raises(Interrupted, match="--resume"):
        run(make_task(whole.config), tmp_path, StopAt(stop_at))
    resumed = make_task(whole.config)
    run(resumed, tmp_path)
    assert whole.is_same(resumed, tmp_path)


def test_recomputed_layers_change_no_bit(make_task: Callable[..., Task], tmp_path: Path, whole: Whole) -> None:
    config = trees.changed(whole.config, {"optim.gradient_checkpointing": True})
    task = make_task(config)
    run(task, tmp_path)
    assert whole.is_same(task, tmp_path)


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training that draws from the random number generator, as dropout or noise on embeddings would."""
    from plaudit_training import train

    plain = train.forward

    def forward(*args: Any) -> Tensor:
        scores = plain(*args)
        return scores + 0.1 * torch.randn(scores.shape)

    monkeypatch.setattr(train, "forward", forward)
    yield


@pytest.mark.usefixtures("noisy")
def test_the_generators_are_part_of_the_state(
    make_task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_task(settings())
    run(whole, tmp_path / "whole")
    for name, forget in (("cut", False), ("control", True)):
        with pytest.raises(Interrupted):
            run(make_task(settings()), tmp_path / name, StopAt(3))
        resumed = make_task(settings())
        if forget:
            monkeypatch.setattr(state, "restore_generators", lambda states: None)
        run(resumed, tmp_path / name)
        assert (weights(resumed) == weights(whole)) != forget


def forget_moments(snapshot: Snapshot) -> Snapshot:
    return replace(snapshot, tensors={**snapshot.tensors, "optimizer": {}})


def forget_a_step(snapshot: Snapshot) -> Snapshot:
    progress = {**snapshot.state["progress"], "step": snapshot.step - 1}
    return replace(snapshot, state={**snapshot.state, "progress": progress})


@pytest.mark.parametrize("forget", [forget_moments, forget_a_step])
def test_what_is_left_out_of_a_checkpoint_makes_a_difference(
    make_task: Callable[..., Task], tmp_path: Path, whole: Whole, forget: Callable[[Snapshot], Snapshot]
) -> None:
    with pytest.raises(Interrupted):
        run(make_task(whole.config), tmp_path, StopAt(7))
    kept = checkpoint.newest(tmp_path / "checkpoints")
    assert kept is not None and kept.step > 1
    checkpoint.save(tmp_path / "checkpoints", forget(kept), keep=2)
    resumed = make_task(whole.config)
    run(resumed, tmp_path)
    assert weights(resumed) != weights(whole.task)


def test_a_flipped_byte_costs_one_checkpoint_and_no_bit(
    make_task: Callable[..., Task], tmp_path: Path, whole: Whole, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Interrupted):
        run(make_task(whole.config), tmp_path, StopAt(7))
    newest, _ = list(checkpoint.steps(tmp_path / "checkpoints").values())
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(bytes(data))
    resumed = make_task(whole.config)
    run(resumed, tmp_path)
    assert newest.name in caplog.text and "falling back" in caplog.text
    assert whole.is_same(resumed, tmp_path)


def test_a_disk_that_fails_for_a_while_costs_checkpoints_and_no_bit(
    make_task: Callable[..., Task], tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    real, asked = checkpoint.save, [0]

    def failing(*args: Any, **kwargs: Any) -> Path:
        asked[0] += 1
        if asked[0] in (1, 2, 4):
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", failing)
    task = make_task(whole.config)
    run(task, tmp_path)
    assert caplog.text.count("no checkpoint at step") == 3
    assert whole.is_same(task, tmp_path)
    monkeypatch.setattr(checkpoint, "save", lambda *args, **kwargs: failing_for_good())
    with pytest.raises(OSError, match="No space"):
        run(make_task(whole.config), tmp_path / "full")


def failing_for_good() -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("part", "word"), [("config", "config"), ("data", "data")])
def test_a_checkpoint_of_another_run_is_refused(
    make_task: Callable[..., Task], tmp_path: Path, part: str, word: str
) -> None:
    task = make_task(settings())
    with pytest.raises(Interrupted):
        run(task, tmp_path, StopAt(2))
    other = replace(task, config=settings(seed=1)) if part == "config" else replace(task, data="other")
    with pytest.raises(Exception, match=f"another {word}"):
        run(other, tmp_path)


def poison(example: Example) -> Example:
    """A comparison that asks for more than a float can hold."""
    broken = tuple(replace(c, margin=float("inf")) for c in example.record.comparisons)
    return replace(example, record=replace(example.record, comparisons=broken))


def poisoned(task: Task, every: int) -> Task:
    return replace(task, train=[poison(e) if i % every == 0 else e for i, e in enumerate(task.train)])


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    make_task: Callable[..., Task], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = poisoned(make_task(settings()), 24)
    trainer = run(task, tmp_path)
    skipped = [event for event in events(tmp_path, "step") if event["skipped"]]
    assert trainer.progress.skipped == len(skipped) == 1
    assert skipped[0]["loss"] is None
    assert "not finite (1 so far)" in caplog.text
    assert all(torch.isfinite(p).all() for p in task.model.module.parameters())


def test_too_many_of_them_stop_the_run(make_task: Callable[..., Task], tmp_path: Path) -> None:
    task = poisoned(make_task(settings(optim__max_skipped_steps=2)), 1)
    before = weights(task)
    with pytest.raises(Diverged, match="3 steps"):
        run(task, tmp_path)
    assert weights(task) == before
    assert Diverged.exit_code == 1


def test_a_run_that_learned_nothing_is_no_success(make_task: Callable[..., Task], tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="all 4 steps"):
        run(poisoned(make_task(settings()), 1), tmp_path)


def test_what_is_saved_already_is_not_saved_again_as_a_run_gives_way(
    make_task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saved = checkpoint.save, list[int]()

    def save(root: Path, snapshot: Snapshot, **rest: Any) -> Path:
        saved.append(snapshot.step)
        return real(root, snapshot, **rest)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(Interrupted, match="after step 1 of 4; go on"):
        run(make_task(settings(checkpoint__every=1, optim__token_budget=10**6)), tmp_path, StopAt(2))
    assert saved == [1]


def test_early_stopping_keeps_the_best(make_task: Callable[..., Task], tmp_path: Path) -> None:
    config = settings(
        optim__learning_rate=0.3, optim__warmup_ratio=1.0, evaluation__every=1, evaluation__patience=2,
        optim__num_train_epochs=6,
    )  # fmt: skip
    task = make_task(config)
    trainer = run(task, tmp_path)
    values = [event["nll"] for event in events(tmp_path, "evaluation")]
    best = values.index(min(values)) + 1
    assert trainer.progress.step == len(values) == best + 2 < task.steps
    assert trainer.progress.best_step == best
    again = evaluate(task.model, task.held_out, token_budget=1500, bootstrap=0)
    assert again.metrics["nll"].value == values[best - 1], "the model has the weights of the best evaluation"


EARLY: dict[str, Any] = {
    "optim__learning_rate": 0.3, "optim__warmup_ratio": 1.0, "evaluation__every": 1, "evaluation__patience": 2,
    "optim__num_train_epochs": 6, "checkpoint__every": 100,
}  # fmt: skip


def test_the_best_is_kept_though_it_could_not_be_saved(
    make_task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task, real = make_task(settings(**EARLY)), checkpoint.save
    run(task, tmp_path / "whole")
    best = min(events(tmp_path / "whole", "evaluation"), key=lambda event: float(event["nll"]))["step"]

    def failing(root: Path, snapshot: Snapshot, **kwargs: Any) -> Path:
        if snapshot.step == best:
            failing_for_good()
        return real(root, snapshot, **kwargs)

    monkeypatch.setattr(checkpoint, "save", failing)
    other = make_task(settings(**EARLY))
    run(other, tmp_path / "failing")
    assert f"no checkpoint at step {best}" in caplog.text and weights(other) == weights(task)
    late = make_task(settings(**EARLY))
    run(late, tmp_path / "failing")
    assert f"not of step {best}, the best evaluation" in caplog.text, "a new process has them no more, and says so"


def test_a_run_that_cannot_be_saved_as_it_gives_way_says_so(
    make_task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save", lambda *args, **kwargs: failing_for_good())
    with pytest.raises(Interrupted, match=r"could not be saved \(no step is saved\); go on with --resume"):
        run(make_task(settings()), tmp_path, StopAt(3))


def test_margins_and_votes_reach_the_loss(make_task: Callable[..., Task], tmp_path: Path) -> None:
    task = make_task(settings())
    wide = replace(task, train=[
        replace(e, record=replace(e.record, comparisons=tuple(replace(c, margin=3.0) for c in e.record.comparisons)))
        for e in task.train
    ])  # fmt: skip
    run(task, tmp_path / "plain")
    fresh = make_task(settings())
    run(replace(wide, model=fresh.model), tmp_path / "wide")
    plain, margin = (events(tmp_path / name, "step")[0]["loss"] for name in ("plain", "wide"))
    assert margin > plain + 1.5


class Collector:
    def __init__(self) -> None:
        self.seen: list[tuple[int, Sequence[str]]] = []

    def log(self, step: int, values: Any) -> None:
        self.seen.append((step, sorted(values)))
        if step == 3:
            raise RuntimeError("the tracker is down")

    def close(self) -> None:
        raise RuntimeError("still down")


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    make_task: Callable[..., Task], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task, collector = make_task(settings()), Collector()
    with caplog.at_level(logging.WARNING):
        trackers = Trackers(["Collector"], lambda _: (collector.log, collector.close))
        trainer = run(task, tmp_path, trackers=trackers)
    assert trainer.progress.step == task.steps
    assert [step for step, _ in collector.seen] == [1, 2, 3]
    assert "train/loss" in collector.seen[0][1] and "train/tokens_per_second" in collector.seen[0][1]
    assert "Collector failed" in caplog.text


def test_a_tracker_that_does_not_start_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wandb.py").write_text("def init(**kwargs):\n    raise ConnectionError('no route to the tracker')\n")
    (tmp_path / "run.toml").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    trackers = make(("wandb", "mlflow"), tmp_path, {}, 0)
    trackers.log(1, {"train/loss": 0.5})
    trackers.close()
    assert "wandb could not be started and is left out: no route" in caplog.text
    assert "mlflow, which is not installed and is left out" in caplog.text


def test_tensorboard_files_hold_the_numbers(make_task: Callable[..., Task], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = make(("tensorboard",), tmp_path, {}, 0)
    run(make_task(settings()), tmp_path, trackers=trackers)
    trackers.close()
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    losses = [event.value for event in found.Scalars("train/loss")]
    assert losses == pytest.approx([event["loss"] for event in events(tmp_path, "step")], rel=1e-6)
