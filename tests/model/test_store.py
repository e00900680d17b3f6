"""Files of a checkpoint against the sha256 that its contract lists, small ones at once, large ones beside the work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from plaudit_model import contract as contracts
from plaudit_model import store
from plaudit_model.contract import RewardContract
from plaudit_model.errors import CheckpointError


@pytest.fixture
def checkpoint(
    tmp_path: Path, reward_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, RewardContract]:
    """A directory of one small file and three large ones, and its contract."""
    monkeypatch.setattr(store, "_LARGE", 100)
    (tmp_path / "config.json").write_bytes(b"c" * 99)
    for number in range(3):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes([number]) * 1000)
    contract = replace(contracts.read(reward_model_dir("qwen3")), files=store.hash_files(tmp_path))
    return tmp_path, contract


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)


def test_what_is_as_it_was_written_passes(checkpoint: tuple[Path, RewardContract]) -> None:
    directory, contract = checkpoint
    assert len(contract.files) == 4
    with store.checking_files(directory, contract):
        pass
    store.check_files(directory, contract)


@pytest.mark.parametrize(("name", "damage"), [
    ("config.json", flip),
    ("config.json", Path.unlink),
    ("model-1.safetensors", Path.unlink),
    ("model-1.safetensors", lambda path: path.write_bytes(b"short")),
])  # fmt: skip
def test_what_is_seen_at_once_is_said_before_anything_is_read(
    checkpoint: tuple[Path, RewardContract], name: str, damage: Callable[[Path], object]
) -> None:
    directory, contract = checkpoint
    damage(directory / name)
    with pytest.raises(CheckpointError, match=name), store.checking_files(directory, contract):
        pytest.fail("the files were used")


@pytest.mark.parametrize("number", range(3))
def test_a_flipped_bit_of_a_large_file_is_found_while_it_is_used(
    checkpoint: tuple[Path, RewardContract], number: int
) -> None:
    directory, contract = checkpoint
    flip(directory / f"model-{number}.safetensors")
    steps = []
    with (
        pytest.raises(CheckpointError, match=f"model-{number}.*sha256 differs"),
        store.checking_files(directory, contract),
    ):
        steps.append("used")
    assert steps


def test_it_explains_what_damaged_files_led_to(checkpoint: tuple[Path, RewardContract]) -> None:
    directory, contract = checkpoint
    with pytest.raises(ZeroDivisionError), store.checking_files(directory, contract):
        raise ZeroDivisionError
    flip(directory / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="sha256 differs") as raised, store.checking_files(directory, contract):
        raise ZeroDivisionError
    assert isinstance(raised.value.__context__, ZeroDivisionError)


def test_a_base_is_known_by_its_own_weights_and_not_by_those_of_folders_within(
    checkpoint: tuple[Path, RewardContract],
) -> None:
    directory, contract = checkpoint
    known = store.weights_identity(directory)
    (directory / "original").mkdir()
    (directory / "original" / "model.safetensors").write_bytes(b"another")
    assert store.weights_identity(directory) == known
    assert known["weights"] == {name: contract.files[name].sha256 for name in sorted(contract.files) if "model" in name}


def test_an_interrupt_does_not_wait_for_the_rest(
    checkpoint: tuple[Path, RewardContract], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, contract = checkpoint
    release, begun = threading.Event(), []

    def slow(path: Path, *_: object) -> None:
        begun.append(path.name)
        assert release.wait(20)

    monkeypatch.setattr(store, "_HASHED_AT_ONCE", 1)
    monkeypatch.setattr(store, "_check_file", lambda path, entry: slow(path) if entry.bytes >= 100 else None)
    with pytest.raises(KeyboardInterrupt), store.checking_files(directory, contract):
        while not begun:
            pass
        threading.Timer(0.05, release.set).start()
        raise KeyboardInterrupt
    assert begun == ["model-0.safetensors"], "those that had not begun never do"


def test_who_may_read_the_directory_may_read_its_files(tmp_path: Path) -> None:
    with store.atomic_directory(tmp_path / "model") as staging:
        (staging / "deep").mkdir()
        for path in (staging / "model.safetensors", staging / "deep" / "file"):
            path.touch(mode=0o600)
    mode = (tmp_path / "model").stat().st_mode & 0o444
    assert mode & 0o400 and all(p.stat().st_mode & 0o444 == mode for p in (tmp_path / "model").rglob("*"))


def test_a_directory_that_a_quota_cuts_off_is_an_error_of_the_disk(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    refused = pytest.raises(OSError, match="model could not be written")
    with full_disk(100), refused, store.atomic_directory(tmp_path / "model") as half:
        save_file({"w": torch.zeros(100)}, half / "model.safetensors")
    assert not list(tmp_path.iterdir())
