"""`plaudit train` and `plaudit eval`, as a user runs them."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch

from plaudit import _trees as trees
from plaudit_model import contract
from plaudit_model.records import Record
from plaudit_model.reward_model import RewardModel
from plaudit_training.config import RunConfig

Toy = Callable[[int, int], list[Record]]
QUICK = [
    "--lr", "2e-3", "--batch-pairs", "16", "--eval-share", "0.2", "--set", "report_to=[]",
    "--set", "evaluation.bootstrap=50",
]  # fmt: skip


class Commands(Protocol):
    folder: Path

    def run(self, *arguments: str | Path) -> int: ...
    def start(self, *arguments: str | Path) -> int: ...
    def wait(self) -> int: ...
    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...


@pytest.fixture(scope="module")
def files(toy: Toy, as_jsonl: Callable[[Sequence[Record]], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and eval.jsonl."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "train.jsonl").write_text(mislabelled(as_jsonl(toy(80, 1))))
    (folder / "eval.jsonl").write_text(mislabelled(as_jsonl(toy(20, 2))))
    return folder


def mislabelled(text: str) -> str:
    """Every ninth comparison the other way round: a model that separates all pairs has no temperature."""
    rows = [json.loads(line) for line in text.splitlines()]
    for row in rows[::9]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def out(plaudit: Commands, files: Path, write_base: Callable[[str], Path]) -> Path:
    """A finished run."""
    code = plaudit.run("train", files / "train.jsonl", "--base", write_base("qwen3"), "--out", files / "out", *QUICK)
    assert code == 0, plaudit.stderr
    return files / "out"


def error(plaudit: Commands) -> str:
    """The one line on stderr."""
    lines = [line for line in plaudit.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), plaudit.stderr
    return lines[0]


def measure(plaudit: Commands, *arguments: str | Path) -> dict[str, Any]:
    assert plaudit.run("eval", *arguments, "--json") == 0, plaudit.stderr
    found: dict[str, Any] = json.loads(plaudit.stdout)
    return found


def test_a_run_leaves_a_model_with_its_contract(out: Path) -> None:
    known = contract.read(out / "model")
    assert known.statistics is not None and known.calibration is not None
    assert known.statistics.n == known.evaluation["responses"]
    assert known.evaluation["accuracy"]["value"] > 0.7
    assert known.evaluation["temperature_fitted_here"] is True
    lineage = known.lineage
    assert lineage["config"] == trees.plain(trees.read(out / "run.toml", RunConfig))
    assert lineage["data"]["records"] + lineage["data"]["eval_records"] == lineage["data"]["reports"]["train"]["used"]
    assert lineage["data"]["reports"]["train"]["quarantined"]["total"] == 0
    assert len(lineage["data"]["fingerprint"]) == 64 and lineage["versions"]["torch"] == torch.__version__
    assert "working_directory_commit" in lineage and lineage["steps"] > 0 and lineage["base"]["name"].startswith("/")


def charts_of(page: str) -> dict[str, str]:
    """By their titles. The page itself asks for nothing, and is closed to what might."""
    assert "<script" not in page and "default-src 'none'" in page
    assert not re.search(r"src=|href=|url\(|@import", page)
    return dict(re.findall(r"(?s)<svg [^>]*aria-label='([^']*)'>(.*?)</svg>", page))


def test_a_run_is_drawn(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert list(charts_of(page)) == [
        "Reliability", "Margins", "Accuracy by length", "Training loss", "Held-out loss, at temperature 1", "Accuracy",
        "Learning rate", "Gradient norm before clipping",
    ]  # fmt: skip
    found = json.loads((out / "report.json").read_text())["evaluation"]
    assert f"<td>accuracy</td>{number(found['accuracy']['value'])}" in page and "not finished" not in page
    assert "= used" in page and torch.__version__ in page and "<td>optim.learning_rate</td><td>0.002</td>" in page
    rows = re.findall(number(r"(0\.\d+)", r"([01]\.\d+)", r"(\d+)"), page)
    bins = [(abs(float(predicted) - float(observed)), int(n)) for predicted, observed, n in rows]
    assert len(bins) == 15 and sum(n for _, n in bins) == found["decided"]
    ece = sum(gap * n for gap, n in bins) / found["decided"]
    assert ece == pytest.approx(found["ece"]["value"], abs=2e-4), "the bins drawn are those of the ece"


def number(*values: float | str) -> str:
    """Cells of columns of numbers."""
    shown = (value if isinstance(value, str) else f"{value:.4f}" for value in values)
    return "".join(f"<td class=number>{value}</td>" for value in shown)


def test_eval_draws_what_it_found_by_source_and_names_stay_text(
    plaudit: Commands, files: Path, out: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "<i>odd.jsonl"
    odd.write_text((files / "eval.jsonl").read_text())
    data = [odd, files / "eval.jsonl"]
    found = measure(plaudit, out / "model", *data, "--bootstrap", "20", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert list(charts_of(page)) == ["Reliability", "Margins", "Accuracy by length"]
    assert "<i>" not in page and "&lt;i&gt;odd.jsonl</td>" in page
    assert number(found["accuracy"]["value"]) in page and found["revision"] in page
    mine = (files / "eval.jsonl").read_bytes()
    assert plaudit.run("eval", out / "model", *data, "--html", files / "eval.jsonl") != 0
    assert "is the input" in error(plaudit) and (files / "eval.jsonl").read_bytes() == mine


def test_plain_transformers_loads_the_model_and_agrees(out: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = RewardModel.load(out / "model")
    plain = AutoModelForSequenceClassification.from_pretrained(out / "model")
    item = model.encoder.encode("red green blue tree house water?", "stone indeed indeed")
    with torch.no_grad():
        score = plain(input_ids=torch.from_numpy(item.ids.astype(np.int64))[None]).logits[0, 0].item()
    assert model.score_encoded([item])[0, 0] == pytest.approx(score, abs=1e-4)


def test_the_resolved_configuration_comes_first_with_reasons(plaudit: Commands, files: Path, out: Path) -> None:
    data = "pairs[red].jsonl"  # short wherever tests run: the table folds long names
    (plaudit.folder / data).write_text((files / "train.jsonl").read_text())
    code = plaudit.run("train", data, "--base", out / "model", "--dry-run", "--out", files / "none")
    assert code == 0, plaudit.stderr
    assert "pairs[red]" in plaudit.stdout, "the name of a file is no markup"
    text = " ".join(plaudit.stdout.split())
    assert text.startswith("configuration")
    assert "others have their defaults" in text and "adam_beta1" not in text and "starter_records" not in text
    for said in (
        "0.0003 131,264 parameters",
        "data.train",
        "comparisons held out say little",
        "--eval-share",
        "preflight",
        "plan:",
        "held out",
        "read",
        "= used",
    ):
        assert said in text, said
    assert not (files / "none").exists(), "a dry run writes nothing"


def test_eval_gives_one_object(plaudit: Commands, files: Path, out: Path) -> None:
    found = measure(plaudit, out / "model", files / "eval.jsonl")
    assert found["accuracy"]["value"] > 0.7 and found["accuracy"]["n"] == found["decided"] == found["comparisons"]
    assert found["accuracy"]["low"] <= found["accuracy"]["value"] <= found["accuracy"]["high"]
    assert set(found["nll"]) == {"value", "low", "high", "n"}
    temperature = contract.read(out / "model").calibration
    assert temperature is not None and found["temperature"] == temperature.temperature
    assert found["temperature_fitted_here"] is False
    assert found["unusable"] == {} and found["truncated"] == 0 and found["data"]["read"] == found["comparisons"]
    assert measure(plaudit, out / "model", files / "eval.jsonl") == found, "deterministic"


def test_eval_by_response_has_the_same_value_and_another_interval(plaudit: Commands, files: Path, out: Path) -> None:
    one = measure(plaudit, out / "model", files / "eval.jsonl")
    other = measure(plaudit, out / "model", files / "eval.jsonl", "--cluster", "response")
    assert one["nll"]["value"] == other["nll"]["value"]
    assert (one["nll"]["low"], one["nll"]["high"]) != (other["nll"]["low"], other["nll"]["high"])


def test_eval_for_people_is_a_table(plaudit: Commands, files: Path, out: Path) -> None:
    assert plaudit.run("eval", out / "model", files / "eval.jsonl", "--bootstrap", "20") == 0
    for word in ("accuracy", "ece", "95% interval", "with a winner", "read "):
        assert word in plaudit.stdout


def test_ties_count_for_nll_and_not_for_accuracy(plaudit: Commands, tmp_path: Path, out: Path) -> None:
    rows = [{"prompt": f"red {i}", "response_a": "blue indeed", "response_b": "tree", "label": label}
            for i, label in enumerate(("a", "tie", "b"))]  # fmt: skip
    (tmp_path / "ties.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = measure(plaudit, out / "model", tmp_path / "ties.jsonl", "--html", tmp_path / "few.html")
    assert (found["comparisons"], found["decided"], found["accuracy"]["n"], found["nll"]["n"]) == (3, 2, 2, 3)
    assert found["accuracy"]["value"] == 0.5


def test_a_bad_row_stops_the_run_and_is_listed(
    plaudit: Commands, files: Path, tmp_path: Path, write_base: Callable[[str], Path]
) -> None:
    good = (files / "train.jsonl").read_text()
    (tmp_path / "bad.jsonl").write_text(good + '{"prompt": "red"}\n')
    base, where = write_base("qwen3"), tmp_path / "out"
    assert plaudit.run("train", tmp_path / "bad.jsonl", "--base", base, "--out", where) == 65
    assert "bad.jsonl" in error(plaudit)
    assert json.loads((where / "quarantine.jsonl").read_text())["line"] == good.count("\n") + 1
    assert not (where / "run.toml").exists()
    code = plaudit.run("train", tmp_path / "bad.jsonl", "--base", base, "--out", where, "--max-bad-rows", "1", *QUICK)
    assert code == 0, plaudit.stderr
    assert contract.read(where / "model").lineage["data"]["reports"]["train"]["quarantined"]["total"] == 1


def test_a_response_that_does_not_fit_is_a_bad_row(plaudit: Commands, tmp_path: Path, files: Path, out: Path) -> None:
    row = {"prompt": "red", "chosen": "blue " * 800, "rejected": "tree"}
    (tmp_path / "long.jsonl").write_text((files / "train.jsonl").read_text() + json.dumps(row) + "\n")
    code = plaudit.run("train", tmp_path / "long.jsonl", "--base", out / "model", "--out", tmp_path / "run")
    assert code == 65
    assert "too_long" in error(plaudit) and "--max-bad-rows" in error(plaudit)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--resume"], 2, "--resume needs --out"),
        (["--out", "OUT"], 2, "already holds a run"),
        (["--out", "OUT", "--resume", "--seed", "9"], 78, "seed is 9, but the run"),
        (["--lr", "7"], 78, "optim.learning_rate must lie in 0..1"),
        (["--set", "optim.lr=1"], 78, "unknown key optim.lr"),
        (["--set", "seed"], 78, "--set is written KEY=VALUE"),
        (["--ties", "lose"], 78, "data.ties: expected one of"),
        (["--report-to", "wandb"], 78, "wandb, which is not installed"),
        (["--config", "absent.toml"], 78, "cannot read the configuration"),
        (["--base", "nowhere"], 78, "there is no directory nowhere"),
        (["--if-missing"], 78, "--if-missing is for"),
        (["--allow", "everything"], 2, "everything"),
    ],
)
def test_errors_are_one_line(
    plaudit: Commands, files: Path, out: Path, write_base: Callable[[str], Path], arguments: list[str], code: int,
    said: str,
) -> None:  # fmt: skip
    given = [str(out) if word == "OUT" else word for word in arguments]
    base = [] if "--base" in given or "--resume" in given else ["--base", str(write_base("qwen3"))]
    if "--out" not in given:
        given += [] if "--resume" in given else ["--out", str(files / "errors")]
    assert plaudit.run("train", files / "train.jsonl", *base, *given) == code, plaudit.stderr
    assert said in error(plaudit)


@pytest.mark.parametrize("name", ["model/thesis.txt", "metrics.jsonl", "checkpoints/mine", "tensorboard/mine"])
def test_what_was_there_before_a_run_is_not_overwritten(
    plaudit: Commands, files: Path, tmp_path: Path, name: str
) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("years of work")
    assert plaudit.run("train", files / "train.jsonl", "--out", tmp_path, *QUICK) == 2
    assert f"holds {Path(name).parts[0]} and no run" in error(plaudit)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


def test_a_run_says_why_it_stopped(plaudit: Commands, files: Path, write_base: Callable[[str], Path]) -> None:
    ends = ["--eval-every", "1", "--patience", "1", "--epochs", "9", "--set", "optim.warmup_ratio=1.0"]
    run = ["train", files / "train.jsonl", "--base", write_base("qwen3"), "--out", files / "stopped", *QUICK]
    assert plaudit.run(*run, *ends, "--lr", "0.3") == 0, plaudit.stderr
    report = json.loads((files / "stopped/report.json").read_text())
    step, best = report["progress"]["step"], report["progress"]["best_step"]
    said = report["stopped"]
    assert said in plaudit.stdout and said.startswith(f"stopped after step {step} of ") and step > best
    assert said.endswith(f": 1 evaluations without a better nll than at step {best}")
    assert f"<td>{said}</td>" in (files / "stopped/report.html").read_text()


def test_eval_tells_what_it_found_where_its_page_cannot_be_written(
    plaudit: Commands, files: Path, out: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    asked = ["eval", out / "model", files / "eval.jsonl", "--json", "--html", page]
    command = plaudit.start(*asked)
    while Path(f"/proc/{command}").exists() and not list(tmp_path.glob(".page.html.writing-*")):
        time.sleep(0.001)
    page.mkdir()  # while it scores
    assert plaudit.wait() == 74 and "page.html cannot be written" in plaudit.stderr
    assert json.loads(plaudit.stdout)["accuracy"]["n"] > 0
    assert plaudit.run(*asked) == 65 and error(plaudit).endswith("page.html cannot be written: Is a directory")
    assert not plaudit.stdout, "what is a directory to begin with is not scored for"


def test_a_file_whose_name_is_not_utf8_is_drawn_and_refused_where_it_would_be_written(
    plaudit: Commands, files: Path, out: Path, tmp_path: Path
) -> None:
    data = tmp_path / "t\udcff.jsonl"
    data.write_bytes((files / "eval.jsonl").read_bytes())
    measure(plaudit, out / "model", data, "--html", tmp_path / "page.html")
    assert "t\\udcff.jsonl</td>" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert plaudit.run("train", data, "--base", out / "model", "--out", tmp_path / "out") == 78
    assert "data.train[0]: expected text that UTF-8 can hold" in error(plaudit) and not (tmp_path / "out").exists()


def test_the_starter_replaces_nothing_but_a_starter(plaudit: Commands, tmp_path: Path, out: Path) -> None:
    mine = Path(shutil.copytree(out / "model", tmp_path / "mine"))
    fit = ["train", "starter", "--out", mine, "--set", "data.starter_records=60", "--dry-run"]
    assert plaudit.run(*fit) == 2 and "holds another model than a starter" in error(plaudit)
    (mine / "reward.json").write_text("years of work")
    assert plaudit.run(*fit) == 2 and "holds another model than a starter" in error(plaudit)
    known = json.loads((out / "model/reward.json").read_text())
    known["lineage"]["base"]["name"] = "starter-scratch"
    (mine / "reward.json").write_text(json.dumps(known))
    assert plaudit.run(*fit) == 0, "a starter, whatever became of its files"
    (mine / "reward.json").rename(mine / "thesis.txt")
    assert plaudit.run(*fit) == 2 and "is no reward model, and would be replaced" in error(plaudit)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused_before_training(
    plaudit: Commands, files: Path, out: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(out / "model", tmp_path / "base"))
    spec = json.loads((base / "tokenizer.json").read_text())
    top = 1 + max(*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"]))
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    spec["added_tokens"] += [{"id": i, "content": f"<extra{i}>", **options} for i in range(top, rows + 1)]
    (base / "tokenizer.json").write_text(json.dumps(spec))
    (base / "reward.json").unlink()
    assert plaudit.run("train", files / "train.jsonl", "--base", base, "--out", tmp_path / "run", *QUICK) == 78
    said = error(plaudit)
    assert f"{rows + 1:,} tokens, the embeddings have {rows:,}" in said and "resize_token_embeddings" in said


def test_a_missing_file_is_an_error_of_the_data(plaudit: Commands, tmp_path: Path, out: Path) -> None:
    code = plaudit.run("train", tmp_path / "absent.jsonl", "--base", out / "model", "--out", tmp_path / "run")
    assert code == 65 and "absent.jsonl" in error(plaudit)
    assert plaudit.run("eval", out / "model", tmp_path / "absent.jsonl") == 65


def test_eval_refuses_what_is_no_reward_model(plaudit: Commands, files: Path, tmp_path: Path) -> None:
    assert plaudit.run("eval", tmp_path, files / "eval.jsonl") == 78
    error(plaudit)


def test_a_dry_run_fits_no_starter_and_touches_no_run(plaudit: Commands, files: Path) -> None:
    home, run = plaudit.folder / "home", plaudit.folder / "home" / "starter-run"
    run.mkdir(parents=True)
    (run / "run.toml").write_text("seed = 7\n")
    small = ["--set", "data.starter_records=60", "--eval-share", "0.2"]
    assert plaudit.run("train", "starter", "--dry-run", *small) == 0, plaudit.stderr
    assert "would be fitted" in plaudit.stdout and "plan:" in plaudit.stdout
    assert plaudit.run("train", files / "train.jsonl", "--dry-run") == 0, plaudit.stderr
    assert "would first be fitted" in plaudit.stdout and "plan:" in plaudit.stdout
    assert plaudit.run("train", files / "absent.jsonl") == 65 and "absent.jsonl" in error(plaudit)
    assert [path.name for path in home.rglob("*")] == ["starter-run", "run.toml"]
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert plaudit.run("train", "starter", *small) == 2 and "another process" in error(plaudit)
    assert (run / "run.toml").read_text() == "seed = 7\n", "a live run is left alone"


def test_the_starter_is_fitted_once_and_is_the_default_base(plaudit: Commands, files: Path) -> None:
    small = ["--set", "data.starter_records=60", "--eval-share", "0.2", "--set", "report_to=[]"]
    assert plaudit.run("train", "starter", *small) == 0, plaudit.stderr
    model = plaudit.folder / "home" / "starter"
    known = contract.read(model)
    assert known.label == "synthetic" and known.evaluation["accuracy"]["n"] > 0
    assert "held-out evaluation" in plaudit.stdout
    assert "your own run" not in plaudit.stdout and "shards" not in plaudit.stderr, plaudit.stderr
    first = known.files["model.safetensors"]

    assert plaudit.run("train", "starter", "--if-missing") == 0
    assert "the starter model is in" in plaudit.stdout and "step" not in plaudit.stdout
    assert plaudit.run("train", "starter", *small) == 0, plaudit.stderr
    assert contract.read(model).files["model.safetensors"] == first, "a function of the seed"

    assert plaudit.run("train", files / "train.jsonl", "--set", "evaluation.bootstrap=20") == 0, plaudit.stderr
    assert "your own run, which starts from it" in plaudit.stdout and "weights" not in plaudit.stderr, plaudit.stderr
    (run,) = (plaudit.folder / "runs").iterdir()
    assert run.name.startswith("train-2") and (run / "tensorboard").is_dir()
    assert contract.read(run / "model").lineage["base"]["revision"] == contract.read(model).revision()
    assert contract.read(run / "model").label == ""
