"""Best-of-n with real parts: a policy is sampled, a served model scores, and what is selected is trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from plaudit import Client, cli
from plaudit.bon import generate as generation

ENTRIES = {"bon": EntryPoint("bon", "plaudit.bon.cli:app", cli.GROUP)}
LOCAL = EntryPoint("torch", "plaudit_loops.sampling:LocalPolicy", generation.LOCAL_GROUP)


@pytest.fixture
def policy_dir(write_base: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny random language model."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = Path(shutil.copytree(write_base("llama"), tmp_path / "policy"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).save_pretrained(directory)
    return directory


def test_samples_are_scored_selected_and_read_by_the_trainer(
    policy_dir: Path,
    served_url: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from plaudit_training.sources import ReadOptions, load

    monkeypatch.setattr(generation, "entry_points", lambda group: [LOCAL])
    monkeypatch.chdir(tmp_path)
    url = served_url("qwen3")

    def bon(*arguments: str) -> None:
        assert cli.run(("bon", *arguments), ENTRIES) == 0

    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"question {n}?"}) + "\n" for n in range(6)))
    policy = ("--policy", str(policy_dir), "--n", "8", "--max-new-tokens", "8", "--batch-size", "8")
    bon("generate", "prompts.jsonl", "--out", "samples.jsonl", *policy)
    bon("score", "samples.jsonl", "--out", "scored.jsonl", "--url", url)
    rows = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
    with Client(url) as client:
        identity = client.info().identity
        direct = [float(client.score(row["prompt"], row["response"])) for row in rows[:8]]
    assert [row["score"] for row in rows[:8]] == direct  # the same bits, alone or in a group
    assert all(row["plaudit"]["revision"] == identity.revision for row in rows) and len(rows) == 48
    bon("select", "scored.jsonl", "--out", "pairs.jsonl", "--format", "dpo")
    records, _ = load(["pairs.jsonl"], ReadOptions())
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    assert len(records) == 6
    for record, own in zip(records, by_prompt.values(), strict=True):
        best, worst = (pick(own, key=lambda row: row["score"])["response"] for pick in (max, min))
        assert list(record.responses) == [best, worst]
    capsys.readouterr()
    bon("report", "scored.jsonl", "--json", "--resamples", "50")
    found = json.loads(capsys.readouterr().out)
    assert found["best_of_n"]["n_max"] == 8 and found["scorers"]["score"]["revision"] == identity.revision
    tops = [max(row["score"] for row in own) for own in by_prompt.values()]
    assert found["best_of_n"]["curve"][-1]["score"] == pytest.approx(sum(tops) / 6)
