"""`plaudit train --lora-r`, as a user runs it: the loss falls, little is kept, what is served is what was trained."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from plaudit import _trees as trees
from plaudit_model import contract
from plaudit_model.adapter import require_peft
from plaudit_model.errors import AdapterError
from plaudit_model.oracle import PlainModel, agreement
from plaudit_model.packing import group_items, pack
from plaudit_model.records import Conversation, Record
from plaudit_model.reward_model import RewardModel
from plaudit_training.config import RunConfig
from plaudit_training.train import forward

Toy = Callable[[int, int], list[Record]]
ModelDir = Callable[[str], Path]
LORA = ["--lora-r", "8", "--lora-alpha", "16"]
QUICK = [
    "--lr", "5e-3", "--batch-pairs", "16", "--epochs", "2", "--eval-share", "0.2", "--set", "report_to=[]",
    "--set", "evaluation.bootstrap=50", "--set", "checkpoint.every=3",
]  # fmt: skip


class Commands(Protocol):
    def run(self, *arguments: str | Path) -> int: ...
    def stopped(self, *arguments: str | Path, out: Path, steps: int) -> int: ...
    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...


@pytest.fixture(scope="module")
def data(toy: Toy, as_jsonl: Callable[[Sequence[Record]], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora-data") / "train.jsonl"
    path.write_text(as_jsonl(toy(80, 1)))
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def base(reward_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(reward_model_dir("qwen3"), tmp_path_factory.mktemp("lora-base") / "base"))


@pytest.fixture(scope="module")
def out(plaudit: Commands, data: Path, base: Path) -> Path:
    """A finished run that wrote an adapter."""
    before = sha256(base / "model.safetensors")
    where = data.parent / "out"
    code = plaudit.run("train", data, "--base", base, "--out", where, *LORA, "--lora-save", "adapter", *QUICK)
    assert code == 0, plaudit.stderr
    assert "of them trained: 12.05%" in " ".join(plaudit.stdout.split())
    assert sha256(base / "model.safetensors") == before
    return where


def conversations(toy: Toy) -> list[Conversation]:
    return [(record.prompt, response) for record in toy(20, 5) for response in record.responses]


def scores_of(model: RewardModel, toy: Toy) -> Any:
    encoded = [model.encoder.encode(prompt, response) for prompt, response in conversations(toy)]
    return model.score_encoded(encoded)[:, 0]


def test_the_loss_falls_though_the_base_is_frozen(out: Path) -> None:
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    known = contract.read(out / "model")
    assert known.evaluation["accuracy"]["value"] > 0.7 and known.statistics is not None


def test_checkpoints_hold_the_adapters_and_the_head_alone(out: Path, base: Path) -> None:
    newest = max((out / "checkpoints").glob("step-*"))
    with safe_open(newest / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert len(shapes) == 2 * 7 * 2 + 1 and "score.weight" in shapes, "2 layers, 7 matrices each, A and B; the head"
    trained = sum(int(np.prod(shape)) for shape in shapes.values())
    size, whole = ((path / "model.safetensors").stat().st_size for path in (newest, base))
    assert 4 * trained <= size < 4 * trained + 8192 and size < whole / 4
    adapter = (out / "model" / "adapter_model.safetensors").stat().st_size
    assert abs(adapter - size) < 8192
    total = RewardModel.load(base).parameters + trained - 64
    assert trained / total == pytest.approx(0.1205, abs=1e-4), "as the run said"


def test_the_contract_names_the_base_and_its_hash(out: Path, base: Path) -> None:
    known = contract.read(out / "model")
    assert known.lineage["base"]["weights"] == {"model.safetensors": sha256(base / "model.safetensors")}
    assert known.lineage["base"]["name"] == str(base)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(known.files)
    assert known.lineage["config"] == trees.plain(trees.read(out / "run.toml", RunConfig))
    assert known.lineage["config"]["lora"] == {
        "r": 8, "alpha": 16, "dropout": 0.0, "target_modules": ["all-linear"], "use_rslora": False, "save": "adapter",
    }  # fmt: skip


def test_the_verbs_work_on_an_adapter(plaudit: Commands, out: Path, toy: Toy, tmp_path: Path) -> None:
    model = out / "model"
    assert plaudit.run("info", model, "--json") == 0, plaudit.stderr
    assert json.loads(plaudit.stdout)["revision"] == contract.read(model).revision()
    assert plaudit.run("verify", model, "--json", "--limit", "12") == 0, plaudit.stderr
    assert json.loads(plaudit.stdout)["holds"]
    rows = [{"prompt": prompt[0].content, "response": response} for prompt, response in conversations(toy)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = plaudit.run("score", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", "--model", model)
    assert code == 0, plaudit.stderr
    written = [json.loads(line)["score"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert np.array_equal(np.array(written, dtype=np.float32), scores_of(RewardModel.load(model), toy))


def test_served_offline_and_in_pefts_own_forward(out: Path, toy: Toy, serve: Callable[..., Any]) -> None:
    from plaudit import Client

    offline = scores_of(RewardModel.load(out / "model"), toy)
    result = agreement(offline, PlainModel(out / "model").score(conversations(toy))[:, 0], "float32")
    assert result.std > 0.1 and result.holds, result
    with Client(serve(out / "model").url) as client:
        served = [float(client.score(prompt[0].content, response)) for prompt, response in conversations(toy)[:8]]
    assert np.array_equal(np.array(served, dtype=np.float32), offline[:8])


def test_merged_is_a_plain_checkpoint_with_the_same_scores(
    plaudit: Commands, out: Path, data: Path, base: Path, toy: Toy, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    code = plaudit.run("train", data, "--base", base, "--out", tmp_path / "out", *LORA, *QUICK)
    assert code == 0, plaudit.stderr
    model = RewardModel.load(tmp_path / "out/model")
    assert not (model.directory / "adapter_config.json").exists()
    assert np.array_equal(scores_of(model, toy), scores_of(RewardModel.load(out / "model"), toy))
    plain = AutoModelForSequenceClassification.from_pretrained(model.directory)
    item = model.encoder.encode("red green blue?", "stone indeed")
    with torch.no_grad():
        score = plain(input_ids=torch.from_numpy(item.ids.astype(np.int64))[None]).logits[0, 0].item()
    assert model.score_encoded([item])[0, 0] == pytest.approx(score, abs=1e-4)


def test_a_run_is_not_resumed_on_another_base(plaudit: Commands, data: Path, base: Path, tmp_path: Path) -> None:
    mine, where = Path(shutil.copytree(base, tmp_path / "base")), tmp_path / "out"
    (mine / "reward.json").unlink()
    assert plaudit.stopped("train", data, "--base", mine, *LORA, *QUICK, out=where, steps=1) == 75, plaudit.stderr
    weights = load_file(mine / "model.safetensors")
    weights["model.norm.weight"] += 0.1
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    assert plaudit.run("train", "--resume", "--out", where) == 78
    assert "was computed with another base" in plaudit.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lora-alpha", "8"], "lora.r is 0"),
        (["--lora-save", "adapter"], "set --lora-r"),
        (["--lora-r", "4", "--lora-target-modules", "q_proj, nothing"], "called nothing; there are down_proj"),
        (["--lora-r", "4", "--lora-dropout", "1"], "lora.dropout must lie in 0..0.9"),
        (["--lora-r", "4", "--lora-save", "both"], "lora.save: expected one of merged, adapter"),
        (["--lora-r", "4", "--base", "UNTRAINED"], "has no weights"),
    ],
)
def test_errors_are_one_line(
    plaudit: Commands, data: Path, base: Path, write_base: ModelDir, tmp_path: Path, arguments: list[str], said: str
) -> None:
    given = [str(write_base("qwen3")) if word == "UNTRAINED" else word for word in arguments]
    code = plaudit.run("train", data, "--base", base, "--out", tmp_path / "out", *given)
    lines = plaudit.stderr.splitlines()
    assert code == 78 and len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], lines


def test_the_default_rate_is_ten_times_higher_and_says_so(
    plaudit: Commands, data: Path, base: Path, tmp_path: Path
) -> None:
    options = ["--lora-r", "4", "--lora-target-modules", "q_proj,v_proj", "--use-rslora", "--dry-run"]
    assert plaudit.run("train", data, "--base", base, "--out", tmp_path / "out", *options) == 0
    text = " ".join(plaudit.stdout.split())
    assert "optim.learning_rate 0.003 " in text and "10 times 0.0003, as TRL advises" in text
    assert "lora.target_modules q_proj, v_proj" in text and "lora.use_rslora True" in text


def test_bf16_training_has_fp32_adapters_and_gradients_near_those_of_fp32(base: Path) -> None:
    gradients = []
    for dtype in ("float32", "bfloat16"):
        model = RewardModel.from_base(base, seed=0, device="cpu")
        model.adapt(str(base), seed=0, r=4, alpha=8, dropout=0.0, target_modules=("all-linear",), use_rslora=False)
        model.train_mode()
        items = [model.encoder.encode("red green blue?", text) for text in ("stone indeed", "wind", "fire and water")]
        scores = forward(model, pack(group_items(items, share=True)), dtype)
        assert scores.dtype == torch.float32
        (scores * torch.tensor([1.0, -0.5, 0.25])).sum().backward()
        trained = {name: p for name, p in model.module.named_parameters() if p.grad is not None}
        assert all(p.dtype == torch.float32 for p in trained.values())
        gradients.append(torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_without_peft_there_is_a_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AdapterError, match=r"pip install .*\[peft\]'"):
        require_peft()
