"""Run configurations: there and back, and what is refused."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaudit import _trees as trees
from plaudit.errors import ConfigurationError
from plaudit_model.json_lines import write_whole
from plaudit_model.run_folder import RunExists, settle
from plaudit_training.config import HELP, RunConfig
from plaudit_training.prepare import learning_rate, read_data, resolve
from plaudit_training.run import discard

texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20)


@given(
    st.lists(texts, max_size=3),
    st.dictionaries(texts, texts, max_size=3),
    st.floats(0, 1),
    st.integers(0, 2**63 - 1),
    texts,
)
def test_what_is_written_is_read(files: list[str], columns: dict[str, str], lr: float, seed: int, label: str) -> None:
    changes = {"data.train": files, "data.columns": columns, "optim.learning_rate": lr, "seed": seed, "label": label}
    config = trees.changed(RunConfig(), changes)
    assert trees.table(RunConfig, tomllib.loads(trees.toml(config))) == config


def test_a_file_has_the_same_configuration(tmp_path: Path) -> None:
    lora = {"lora.r": 4, "lora.target_modules": ["q_proj"], "lora.use_rslora": True}
    data = {"data.columns": {"prompt": "the question"}}
    config = trees.changed(RunConfig(), {"optim.batch_pairs": 64, **data, **lora})
    (tmp_path / "run.toml").write_text(trees.toml(config))
    assert trees.read(tmp_path / "run.toml", RunConfig) == config


def test_a_path_may_end_in_a_mapping_which_keeps_its_other_keys() -> None:
    config = trees.changed(RunConfig(), {"data.columns": {"prompt": "question", "chosen": "good"}})
    changed = trees.changed(config, {"data.columns.prompt": "asked", "data.columns.rejected": "bad"})
    assert changed.data.columns == {"prompt": "asked", "chosen": "good", "rejected": "bad"}
    assert config.data.columns == {"prompt": "question", "chosen": "good"} and RunConfig().data.columns == {}
    with pytest.raises(ConfigurationError, match="data.columns.prompt: expected a string, got 3"):
        trees.changed(config, {"data.columns.prompt": 3})


def test_what_is_absent_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[optim]\nlearning_rate = 1e-5\n")
    config = trees.read(tmp_path / "run.toml", RunConfig)
    assert config == trees.changed(RunConfig(), {"optim.learning_rate": 1e-5})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1", "unknown key learning_rate"),
        ("[optim]\nlr = 1", "unknown key optim.lr; known keys: learning_rate"),
        ("[optim]\nlearning_rate = '1e-5'", "optim.learning_rate: expected a finite number, got '1e-5'"),
        ("[optim]\nlearning_rate = nan", "expected a finite number"),
        (f"[optim]\nweight_decay = {10**400}", "optim.weight_decay: expected a finite number, got 1000"),
        ("[optim]\nnum_train_epochs = true", "optim.num_train_epochs: expected an integer, got True"),
        ("[optim]\nnum_train_epochs = 1.5", "expected an integer"),
        ("[data]\nties = 'lose'", "data.ties: expected one of"),
        ("[data]\ntrain = 'a.jsonl'", "data.train: expected a list"),
        ("data = 3", "data: expected a table"),
        ("seed = -1", "seed must lie in 0"),
        ("[checkpoint]\nkeep = 1", "checkpoint.keep must lie in 2"),
        ("[evaluation]\npatience = 2", "evaluation.patience needs evaluation.every"),
        ("[data]\neval_strict_ids = 'ids.txt'", "data.eval_strict_ids needs data.eval"),
        ("report_to = ['email']", "report_to: expected tensorboard, wandb or mlflow"),
        ("[lora]\nalpha = 64", "lora.r is 0, so there are no adapters"),
        ("[lora]\nr = 4\nuse_rslora = 1", "lora.use_rslora: expected true or false, got 1"),
        ("seed =", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigurationError, match=message) as caught:
        trees.read(tmp_path / "run.toml", RunConfig)
    assert "run.toml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read the configuration"):
        trees.read(tmp_path / "absent.toml", RunConfig)


def test_every_field_explains_itself() -> None:
    for path in trees.flatten(RunConfig()):
        assert len(HELP[path]) > 4, path


@pytest.mark.parametrize(
    ("parameters", "rate"),
    [(8_000_000_000, 5e-6), (1_000_000_000, 5e-6), (600_000_000, 2e-5), (66_000_000, 5e-5), (3_000_000, 3e-4)],
)
def test_the_learning_rate_goes_by_size(parameters: int, rate: float) -> None:
    assert learning_rate(parameters)[0] == rate
    higher, why = learning_rate(parameters, adapters=True)
    assert higher == pytest.approx(10 * rate) and "10 times" in why
    assert f"{rate:g}".replace("e-0", "e-").replace("0.0003", "3e-4") in HELP["optim.learning_rate"]


def test_resolving_leaves_nothing_open_and_says_why() -> None:
    config, reasons = resolve(RunConfig(), device="cuda:0", parameters=600_000_000, pairs=3200)
    assert (config.optim.learning_rate, config.optim.batch_pairs, config.model.dtype) == (2e-5, 64, "bfloat16")
    assert "600,000,000 parameters" in reasons["optim.learning_rate"]
    assert reasons["model.dtype"] == "on cuda:0"
    changes = {"optim.learning_rate": 1e-6, "optim.batch_pairs": 7, "model.dtype": "float32"}
    given = trees.changed(RunConfig(), changes)
    assert resolve(given, device="cuda", parameters=1, pairs=1) == (given, {})


def stored(out: Path, **changes: Any) -> RunConfig:
    config, _ = resolve(RunConfig(**changes), device="cpu", parameters=10, pairs=100)
    (out / "run.toml").write_text(trees.toml(config))
    return config


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    stored(tmp_path)
    with pytest.raises(RunExists, match="--resume"):
        settle(RunConfig(), tmp_path, resume=False)
    assert settle(RunConfig(), tmp_path / "new", resume=False) == RunConfig()


def test_resuming_takes_the_configuration_of_the_run(tmp_path: Path) -> None:
    config = stored(tmp_path, seed=3)
    assert settle(dataclasses.replace(RunConfig(), seed=3), tmp_path, resume=True) == config
    with pytest.raises(ConfigurationError, match="seed is 4, but the run in .* has 3"):
        settle(dataclasses.replace(RunConfig(), seed=4), tmp_path, resume=True)


def test_the_configuration_of_a_run_is_written_at_once_and_once(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    write_whole(path, trees.toml(RunConfig()))
    before = path.stat()
    write_whole(path, trees.toml(RunConfig()))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    write_whole(path, trees.toml(dataclasses.replace(RunConfig(), seed=3)))
    assert trees.read(path, RunConfig).seed == 3 and path.stat().st_ino != before.st_ino, "replaced, not rewritten"
    assert list(tmp_path.iterdir()) == [path]


def test_strict_ids_are_of_the_training_files(tmp_path: Path) -> None:
    row = '{{"id": "{0}", "prompt": "{0}?", "chosen": "yes", "rejected": "no"}}\n'
    for name, ids in (("train", "ab"), ("eval", "cd")):
        (tmp_path / f"{name}.jsonl").write_text("".join(map(row.format, ids)))
        (tmp_path / f"{name}.txt").write_text(f"{ids[0]}\n")
    paths = {f"data.{name}": [str(tmp_path / f"{name}.jsonl")] for name in ("train", "eval")}
    changes = paths | {"data.strict_ids": str(tmp_path / "train.txt")}
    data = read_data(trees.changed(RunConfig(), changes), tmp_path)
    assert [len(data.train), len(data.held_out)] == [1, 2]
    changes |= {"data.eval_strict_ids": str(tmp_path / "eval.txt")}
    data = read_data(trees.changed(RunConfig(), changes), tmp_path)
    assert [record.id for record in (*data.train, *data.held_out)] == ["a", "c"]


def test_only_a_run_is_discarded(tmp_path: Path) -> None:
    stored(tmp_path)
    (tmp_path / "thesis.tex").write_text("three years")
    with pytest.raises(RunExists, match=r"thesis\.tex"):
        discard(tmp_path)
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / ".lock").touch()
    discard(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [".lock"], "whoever deletes a run holds its lock"
