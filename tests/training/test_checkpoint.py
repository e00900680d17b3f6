"""Checkpoints under damage, kills between any two writes, full disks."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from plaudit_model import checkpoint
from plaudit_model.checkpoint import Saver, Snapshot
from plaudit_model.errors import CheckpointError


def snapshot(step: int) -> Snapshot:
    weights = {"w": torch.full((7, 5), float(step)), "b": torch.arange(3) + step}
    return Snapshot(step, {"model": weights, "rng": {"torch": torch.tensor([step], dtype=torch.uint8)}}, {"step": step})


def same(a: Snapshot, b: Snapshot) -> bool:
    return a.step == b.step and a.state == b.state and {
        (name, key): value.tolist() for name, part in a.tensors.items() for key, value in part.items()
    } == {(name, key): value.tolist() for name, part in b.tensors.items() for key, value in part.items()}  # fmt: skip


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, snapshot(3), keep=2)
    loaded = checkpoint.newest(tmp_path)
    assert loaded is not None and same(loaded, snapshot(3))
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent") is None


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        checkpoint.save(tmp_path, snapshot(step), keep=2, best=2)
    assert list(checkpoint.steps(tmp_path)) == [5, 4, 2]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, snapshot(1), keep=2)
    again = Snapshot(1, snapshot(1).tensors, {"step": 1, "more": True})
    checkpoint.save(tmp_path, again, keep=2)
    loaded = checkpoint.newest(tmp_path)
    assert loaded is not None and loaded.state == again.state


def test_a_checkpoint_that_is_replaced_is_deleted_when_its_successor_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **about: object) -> None:
        if path.exists():
            raise KeyboardInterrupt

    checkpoint.save(tmp_path, snapshot(1), keep=2)
    again = Snapshot(1, snapshot(1).tensors, {"step": 1, "more": True})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        checkpoint.save(tmp_path, again, keep=2)
    loaded = checkpoint.newest(tmp_path)
    assert loaded is not None and loaded.state == again.state
    checkpoint.save(tmp_path, snapshot(2), keep=2)
    assert not list(tmp_path.glob(".*")), "what was replaced is deleted the next time"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << at % 8
    path.write_bytes(bytes(data))


def damaged(tmp_path: Path, name: str, harm: Callable[[Path], object]) -> Path:
    """A root with two checkpoints, the newer of which has come to harm."""
    root = tmp_path / name
    for step in (1, 2):
        checkpoint.save(root, snapshot(step), keep=2)
    harm(root / "step-00000002")
    return root


def zero_a_page(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(b"\0" * len(path.read_bytes()))


def swap_two_files(directory: Path) -> None:
    one, two = directory / "model.safetensors", directory / "rng.safetensors"
    held = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(held)


def make_a_directory_of_it(directory: Path) -> None:
    (directory / "state.json").unlink()
    (directory / "state.json").mkdir()


HARM: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda d: (d / "manifest.json").unlink(),
    "empty manifest": lambda d: (d / "manifest.json").write_text(""),
    "manifest of another": lambda d: shutil.copy(d.parent / "step-00000001" / "manifest.json", d),
    "missing file": lambda d: (d / "rng.safetensors").unlink(),
    "extra file": lambda d: (d / "extra.safetensors").write_bytes(b"x"),
    "truncated": lambda d: os.truncate(d / "model.safetensors", 100),
    "zeroed": zero_a_page,
    "swapped": swap_two_files,
    "state of another": lambda d: shutil.copy(d.parent / "step-00000001" / "state.json", d),
    "file became a directory": make_a_directory_of_it,
}


@pytest.mark.parametrize("name", HARM)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    root = damaged(tmp_path, "root", HARM[name])
    with caplog.at_level(logging.WARNING):
        loaded = checkpoint.newest(root)
    assert loaded is not None and same(loaded, snapshot(1))
    assert "step-00000002" in caplog.text and "falling back" in caplog.text
    assert list(checkpoint.steps(root)) == [1] and (root / "damaged-step-00000002").is_dir()


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(tmp_path: Path) -> None:
    root = damaged(tmp_path, "root", zero_a_page)
    checkpoint.newest(root)
    checkpoint.save(root, snapshot(2), keep=2)
    assert list(checkpoint.steps(root)) == [2, 1]


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    root = damaged(tmp_path, "root", lambda directory: None)
    directory = root / "step-00000002"
    whole = checkpoint.load(directory)
    for name in ("model.safetensors", "rng.safetensors", "state.json"):
        path = directory / name
        before = path.read_bytes()
        for at in range(0, len(before), 7):
            flip(path, at)
            with pytest.raises(CheckpointError, match=name):
                checkpoint.load(directory)
            path.write_bytes(before)
    manifest = (directory / "manifest.json").read_bytes()
    for at in range(len(manifest)):
        flip(directory / "manifest.json", at)
        try:
            found = checkpoint.load(directory)  # a flip in white space changes nothing
        except CheckpointError:
            continue
        assert same(found, whole)


def test_when_all_are_damaged_it_says_so(tmp_path: Path) -> None:
    root = damaged(tmp_path, "root", zero_a_page)
    zero_a_page(root / "step-00000001")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="all 2 checkpoints"):
            checkpoint.newest(root)


SYSTEM_CALLS = ("mkdir", "rename", "fsync")


def count_calls(monkeypatch: pytest.MonkeyPatch, die_at: int | None, error: BaseException) -> list[str]:
    """Count what `save` asks of the file system; the call number `die_at` raises instead."""
    calls: list[str] = []

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def counted(*args: object, **kwargs: object) -> object:
            calls.append(name)
            if len(calls) - 1 == die_at:
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, counted)

    for name in SYSTEM_CALLS:
        wrap(name)
    return calls


def test_a_failure_of_any_call_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch, None, OSError())
        checkpoint.save(tmp_path / "probe", snapshot(1), keep=2)
        checkpoint.save(tmp_path / "probe", snapshot(2), keep=2)
        checkpoint.save(tmp_path / "probe", snapshot(3), keep=2)
        total = len(calls)
    assert total > 20
    for die_at in range(total):
        root = tmp_path / f"die-{die_at}"
        done = 0
        with pytest.MonkeyPatch.context() as patch:
            count_calls(patch, die_at, OSError(errno.EIO, "input/output error"))
            for step in (1, 2, 3):
                try:
                    checkpoint.save(root, snapshot(step), keep=2)
                except OSError:
                    break
                done = step
        loaded = checkpoint.newest(root)
        found = 0 if loaded is None else loaded.step
        assert found in (done, done + 1), f"call {die_at}: {done} saves returned, step {found} was found"
        assert loaded is None or same(loaded, snapshot(found))


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    for name in (".writing-1", ".pruned-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"part")
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save(tmp_path, snapshot(1), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(OSError, match="MB free"):
        checkpoint.save(tmp_path, snapshot(1), keep=2)
    assert not list(tmp_path.iterdir())


def test_two_failed_saves_are_alarms_and_the_third_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the directory should be")
    saver = Saver(blocked, every=1, keep=2)
    for step in (1, 2):
        saver.save(snapshot(step), None)
        assert saver.due(step), "not saved"
    assert caplog.text.count("no checkpoint at step") == 2
    with pytest.raises(OSError):
        saver.save(snapshot(3), None)


def test_a_quota_is_a_failed_save_though_safetensors_has_an_error_of_its_own(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]], caplog: pytest.LogCaptureFixture
) -> None:
    saver = Saver(tmp_path, every=1, keep=2)
    with full_disk(100):
        for step in (1, 2):
            saver.save(snapshot(step), None)
        assert caplog.text.count("no checkpoint at step") == 2 and saver.saved_at == -1
        with pytest.raises(OSError, match="large"):
            saver.save(snapshot(3), None)
    assert not list(tmp_path.iterdir())


def test_saves_are_due_every_so_many_steps_once(tmp_path: Path) -> None:
    saver = Saver(tmp_path, every=3, keep=2)
    assert [step for step in range(8) if saver.due(step)] == [3, 6]
    saver.save(snapshot(3), None)
    assert not saver.due(3)


def test_left_to_itself_a_save_waits_for_fifty_times_its_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("plaudit_model.checkpoint.time.monotonic", lambda: now[0])
    saver = Saver(tmp_path, every=0, keep=2)
    real = checkpoint.save

    def slow(*args: object, **kwargs: object) -> Path:
        now[0] += 4.0
        return real(*args, **kwargs)  # type: ignore[arg-type]

    assert not saver.due(1)
    now[0] += 31
    assert saver.due(1)
    monkeypatch.setattr(checkpoint, "save", slow)
    saver.save(snapshot(1), None)
    now[0] += 199
    assert not saver.due(2)
    now[0] += 2
    assert saver.due(2)
