"""The policy that a run began with: where training still needs it, a resumed run finds the same or refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from plaudit import _trees as trees
from plaudit_loops import verbs
from plaudit_loops.config import DpoConfig, RlConfig, SftConfig
from plaudit_loops.policy import load_policy
from plaudit_model import checkpoint, store
from plaudit_model.errors import CheckpointError

Begin = Callable[[], None]
RUNS = ("rl", "rl with an adapter", "dpo", "dpo with an adapter", "sft", "sft with an adapter")
NEEDY = [name for name in RUNS if name != "sft"]


def write_weights(base: Path, directory: Path, seed: int) -> None:
    load_policy(base, device="cpu", autocast=False, seed=seed).save(directory)


@pytest.fixture
def start(tiny_policy_dir: Path, tmp_path: Path) -> Path:
    write_weights(tiny_policy_dir, tmp_path / "start", 1)
    return tmp_path / "start"


@pytest.fixture
def begin(request: pytest.FixtureRequest, start: Path, computed: Any, tmp_path: Path, quiet: Console) -> Begin:
    """Begins the run of that name in `out`, or goes on with it."""
    verb, _, adapted = request.param.partition(" ")
    values: dict[str, Any] = {"model.policy": str(start), "run.report_to": [], "optim.learning_rate": 3e-3}
    if adapted:
        pytest.importorskip("peft")
        values["model.lora_r"] = 2
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    row = {"chosen": "c", "rejected": "d"} if verb == "dpo" else {"response": "c"}
    rows.write_text("".join(json.dumps({"prompt": p, **row}) + "\n" for p in "abef"))
    if verb == "rl":
        values |= {"rollout.prompts": [str(rows)], "algorithm.algo": "rloo", "steps": 2, "rollout.max_new_tokens": 4}
        config = trees.changed(RlConfig(), values | {"rollout.prompts_per_step": 2, "rollout.group_size": 2})
        return lambda: verbs.rl(config, out, quiet, computed(lambda text: float(len(text))))
    values |= {"data": [str(rows)], "epochs": 1, "batch_size": 2}
    if verb == "dpo":
        return lambda: verbs.dpo(trees.changed(DpoConfig(), values), out, quiet)
    return lambda: verbs.sft(trees.changed(SftConfig(), values), out, quiet)


@pytest.mark.parametrize("begin", NEEDY, indirect=True)
def test_a_run_does_not_go_on_with_another_policy_in_the_place_of_its_own(
    begin: Begin, start: Path, tiny_policy_dir: Path
) -> None:
    weights = start / "model.safetensors"
    begin()
    was = f"model.safetensors in {start} was sha256 {hashlib.sha256(weights.read_bytes()).hexdigest()}"
    begin()
    write_weights(tiny_policy_dir, start, 2)
    with pytest.raises(CheckpointError, match=f"{was} when the run began and now is sha256 .*; bring that back"):
        begin()
    weights.unlink()
    with pytest.raises(CheckpointError, match=f"{was} when the run began and now is not there"):
        begin()
    write_weights(tiny_policy_dir, start, 1)
    begin()


@pytest.mark.parametrize("begin", NEEDY, indirect=True)
def test_a_run_of_before_policies_were_compared_goes_on_with_a_warning(
    begin: Begin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin()
    begin()
    assert "policy" not in caplog.text
    snapshot = checkpoint.newest(tmp_path / "out/checkpoints")
    assert snapshot is not None
    del snapshot.state["identity"]["policy"]
    checkpoint.save(tmp_path / "out/checkpoints", snapshot, keep=1)
    begin()
    assert "step 2 does not say with which policy it was computed: it is taken for this one" in caplog.text


@pytest.mark.parametrize("begin", ["sft"], indirect=True)
def test_what_is_all_in_the_checkpoint_needs_no_policy_again(
    begin: Begin, start: Path, tiny_policy_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin()
    write_weights(tiny_policy_dir, start, 2)
    begin()
    assert "policy" not in caplog.text


@pytest.mark.parametrize(("begin", "times"), [("sft", 0), ("dpo", 1), ("rl", 1)], indirect=["begin"])
def test_weights_are_read_for_their_hash_at_most_once(
    begin: Begin, times: int, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    hash_file = store.hash_file
    monkeypatch.setattr(store, "hash_file", lambda path: hashed.append(path) or hash_file(path))
    begin()
    assert hashed.count(start / "model.safetensors") == times


@pytest.mark.parametrize("begin", ["rl"], indirect=True)
def test_a_checkpoint_holds_the_hashes_of_the_files(begin: Begin, start: Path, tmp_path: Path) -> None:
    begin()
    snapshot = checkpoint.newest(tmp_path / "out/checkpoints")
    assert snapshot is not None
    assert snapshot.state["identity"]["policy"] == {
        name: store.hash_file(start / name).sha256 for name in ("config.json", "model.safetensors")
    }


def test_a_policy_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no directory"):
        load_policy(Path("owner/name"), device="cpu", autocast=False)
