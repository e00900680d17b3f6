"""Contracts for checkpoints that bring none, and refusals where guessing would be needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plaudit_model import infer
from plaudit_model.contract import FILE_NAME
from plaudit_model.errors import CheckpointError, ContractError
from plaudit_model.reward_model import RewardModel
from plaudit_model.template import pin_date, writes_date

ModelDir = Callable[[str], Path]

DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "Today Date: {{ date_string }}{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
)


@pytest.fixture
def bare(reward_model_dir: ModelDir, tmp_path: Path) -> Path:
    """A checkpoint as the Hub has them: no reward.json."""
    for path in reward_model_dir("qwen3").iterdir():
        if path.name != FILE_NAME:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            data.pop(key, None)
        else:
            data[key] = value
    path.write_text(json.dumps(data))


def test_the_folder_of_a_run_is_told_from_the_model_in_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing$"):
        infer.read_json(tmp_path / "config.json")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json is missing: name .*model\?$"):
        infer.read_json(tmp_path / "config.json")


def test_a_contract_is_inferred_and_scores_alike(bare: Path, reward_model_dir: ModelDir) -> None:
    contract = infer.contract_for(bare)
    assert (contract.pooling, contract.template.kind, contract.max_length) == ("last", "chat", 512)
    ours, theirs = RewardModel.load(reward_model_dir("qwen3")), RewardModel.load(bare)
    item = ours.encoder.encode("Hi", "Hello")
    assert ours.score_encoded([item]) == theirs.score_encoded([theirs.encoder.encode("Hi", "Hello")])


def test_other_weights_are_another_revision(bare: Path) -> None:
    before = infer.contract_for(bare).revision()
    assert infer.contract_for(bare).revision() == before
    weights = bytearray((bare / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (bare / "model.safetensors").write_bytes(weights)
    assert infer.contract_for(bare).revision() != before


def test_a_template_with_todays_date_is_refused_until_it_is_pinned(bare: Path) -> None:
    (bare / "chat_template.jinja").write_text(DATED)
    with pytest.raises(ContractError, match="--pin-date"):
        infer.contract_for(bare)
    pinned = pin_date(DATED, "1 Jan 2025")
    assert not writes_date(pinned)


def test_a_date_that_is_never_written_is_no_reason_to_refuse() -> None:
    assert not writes_date("{% if false %}{{ strftime_now('%d') }}{% endif %}{{ messages }}")
    assert writes_date("{{ strftime_now('%d') }}")
    assert writes_date("{{ strftime_now('%d') }}{{ raise_exception('no') }}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "no score head"),
        ({"architectures": None}, "no stated architecture"),
        ({"id2label": {"0": "a", "1": "b"}}, "2 outputs"),
    ],
)
def test_what_the_configuration_does_not_say_is_not_guessed(bare: Path, change: dict[str, Any], message: str) -> None:
    edit(bare / "config.json", **change)
    with pytest.raises(ContractError, match=message):
        infer.contract_for(bare)


def test_a_model_without_a_template_is_refused(bare: Path) -> None:
    (bare / "chat_template.jinja").unlink()
    edit(bare / "tokenizer_config.json", chat_template=None)
    with pytest.raises(ContractError, match="no chat template"):
        infer.contract_for(bare)


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "nowhere", "a/b/c", "owner/name@main"])
def test_a_name_that_is_nothing_says_so(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"^there is no directory {name} "):
        infer.resolve(name)


def test_what_might_be_a_hub_id_says_so_in_one_short_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        infer.resolve("runs/frist")
    said = str(caught.value)
    assert said.startswith("there is no directory runs/frist, and as a Hub id it could not be had: the Hub could not")
    assert len(said) < 140


def test_an_unfitted_starter_says_how_to_fit_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAUDIT_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match="plaudit train starter"):
        infer.resolve("starter")
