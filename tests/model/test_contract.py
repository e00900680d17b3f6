"""`reward.json`: reading, refusing, identity, schema."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from plaudit_model import contract as contracts
from plaudit_model.contract import Calibration, FileEntry, RewardContract, Statistics, Template
from plaudit_model.errors import ContractError

DOCS = Path(__file__).resolve().parents[2] / "docs"


def example() -> RewardContract:
    return RewardContract(
        architecture="Qwen3ForSequenceClassification",
        template=Template.of("chat", "{{ messages }}"),
        max_length=512,
        pooling="last",
        statistics=Statistics(0.5, 2.0, 100),
        calibration=Calibration(1.5),
        files={"model.safetensors": FileEntry("ab" * 32, 12)},
        lineage={"seed": 0},
    )


def test_a_contract_survives_the_disk(tmp_path: Path) -> None:
    contracts.write(example(), tmp_path)
    assert contracts.read(tmp_path) == example()


Edit = tuple[list[str], Any, str]
EDITS: list[Edit] = [
    (["surprise"], 1, "unknown key 'surprise'"),
    (["head", "kinds"], "sequence", "unknown key 'kinds'"),
    (["pooling"], "mean", "expected one of 'last', 'first'"),
    (["max_length"], "512", "expected an integer"),
    (["max_length"], True, "expected an integer"),
    (["max_length"], 0, "at least 1"),
    (["schema_version"], 99, "schema_version 99"),
    (["statistics", "std"], 0.0, "positive"),
    (["calibration", "temperature"], -1, "positive"),
    (["template", "source"], "{{ other }}", "sha256"),
    (["head", "attributes"], [], "at least one"),
    (["files", "model.safetensors"], [], "expected an object"),
]


@pytest.mark.parametrize(("path", "value", "message"), EDITS)
def test_a_wrong_contract_says_what_is_wrong(path: list[str], value: Any, message: str) -> None:
    data = copy.deepcopy(contracts.to_json(example()))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ContractError, match=message):
        contracts.from_json(data)


def test_a_missing_key_is_named() -> None:
    data = contracts.to_json(example())
    del data["architecture"]
    with pytest.raises(ContractError, match="missing key 'architecture'"):
        contracts.from_json(data)


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_what_is_not_an_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / contracts.FILE_NAME).write_text(text)
    with pytest.raises(ContractError):
        contracts.read(tmp_path)


def test_notes_do_not_change_the_revision_and_scores_do() -> None:
    from dataclasses import replace

    one = example()
    assert replace(one, lineage={"note": "x"}, evaluation={"accuracy": 0.9}, label="y").revision() == one.revision()
    assert replace(one, max_length=511).revision() != one.revision()
    assert replace(one, files={"model.safetensors": FileEntry("cd" * 32, 12)}).revision() != one.revision()


def test_the_published_schema_and_example_are_current() -> None:
    """`docs/reward.schema.json` and `docs/reward.example.json` are what the classes say today."""
    assert json.loads((DOCS / "reward.schema.json").read_text()) == contracts.json_schema()
    contracts.from_json(json.loads((DOCS / "reward.example.json").read_text()))


def test_writing_a_contract_leaves_what_a_link_leads_to(tmp_path: Path) -> None:
    blob, snapshot = tmp_path / "blob", tmp_path / "snapshot"
    snapshot.mkdir()
    blob.write_text("of other revisions, too")
    (snapshot / contracts.FILE_NAME).symlink_to(blob)
    contracts.write(example(), snapshot)
    assert contracts.read(snapshot) == example() and blob.read_text() == "of other revisions, too"
    assert [path.name for path in snapshot.iterdir()] == [contracts.FILE_NAME]
