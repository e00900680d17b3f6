"""Checkpoints: whole directories that are either there and right, or not there.

    step-00000128/   <name>.safetensors...  state.json  manifest.json (the sha256 of all others)

Written beside their final name and renamed (`plaudit_model.store`), then older ones are pruned: a kill between any two
instructions leaves the newest whole one. The reader verifies every hash and falls back, loudly, to the one before.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from plaudit_model import store
from plaudit_model.errors import CheckpointError

LOG = logging.getLogger("plaudit.loops")

MANIFEST, STATE = "manifest.json", "state.json"
SAVE_SHARE, SHORTEST_INTERVAL, MOST_FAILURES = 0.02, 30.0, 3
_NAME = re.compile(r"step-(\d{8,})")
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All there is to know of a run after `step` steps: named tensors by file, and a JSON object."""

    step: int
    tensors: Mapping[str, Tensors]
    state: Mapping[str, Any]


class Saver:
    """When to save, and what to do when it fails. Owns the time and the count of failures."""

    def __init__(self, root: Path, *, every: int, keep: int) -> None:
        self._root, self._every, self._keep = root, every, keep
        self._failures = 0
        self._next = time.monotonic() + SHORTEST_INTERVAL
        self.saved_at = -1

    def due(self, step: int) -> bool:
        """After every so many steps; or, left to itself, so often that saving takes 2% of the time."""
        if step in (0, self.saved_at):
            return False
        return step % self._every == 0 if self._every else time.monotonic() >= self._next

    def save(self, snapshot: Snapshot) -> None:
        """Save. A failure is an alarm and the run goes on from it; the third in a row is raised, OSError."""
        begun = time.monotonic()
        try:
            save(self._root, snapshot, keep=self._keep)
            self.saved_at, self._failures = snapshot.step, 0
        except OSError as error:
            self._failures += 1
            if self._failures >= MOST_FAILURES:
                raise
            LOG.error("no checkpoint at step %d, the one before is intact: %s", snapshot.step, error)
        now = time.monotonic()
        self._next = now + max(SHORTEST_INTERVAL, (now - begun) / SAVE_SHARE)


def save(root: Path, snapshot: Snapshot, *, keep: int) -> None:
    """Write a checkpoint under `root`, then prune to the `keep` newest. Raises OSError; what was there before is then
    untouched."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with store.atomic_directory(root / f"step-{snapshot.step:08d}") as directory:
        for name, tensors in snapshot.tensors.items():
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(plain, directory / f"{name}.safetensors")
        _write(directory / STATE, snapshot.state)
        files = {name: dataclasses.asdict(entry) for name, entry in store.hash_files(directory).items()}
        _write(directory / MANIFEST, {"step": snapshot.step, "files": files})
    for old in list(steps(root).values())[keep:]:
        hidden = old.with_name(f".{old.name}.pruned")
        old.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def steps(root: Path) -> dict[int, Path]:
    """Checkpoint directories by step, newest first. Not verified."""
    found = {int(m[1]): entry for entry in root.glob("step-*") if (m := _NAME.fullmatch(entry.name))}
    return dict(sorted(found.items(), reverse=True))


def newest(root: Path) -> Snapshot | None:
    """The newest checkpoint that verifies, None if there is none at all. Damaged ones on the way are named in a warning
    and set aside. Raises CheckpointError if all are damaged."""
    found, damaged = steps(root), list[Path]()
    for directory in found.values():
        try:
            snapshot = load(directory)
        except CheckpointError as error:
            LOG.warning("%s; falling back to the checkpoint before it", error)
            damaged.append(directory)
            continue
        for other in damaged:
            other.rename(other.with_name(f"damaged-{other.name}-{time.time_ns()}"))
        return snapshot
    if found:
        raise CheckpointError(f"all {len(found)} checkpoints in {root} are damaged; start again with another --out")
    return None


def load(directory: Path) -> Snapshot:
    """One checkpoint, every byte verified. Raises CheckpointError, naming what differs."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        step, files = int(manifest["step"]), dict(manifest["files"])
        there = {name: dataclasses.asdict(entry) for name, entry in store.hash_files(directory).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {directory} is damaged: its {MANIFEST} cannot be read") from error
    there.pop(MANIFEST, None)
    if odd := sorted(name for name in {*there, *files} if there.get(name) != files.get(name)):
        raise CheckpointError(f"checkpoint {directory} is damaged: {odd[0]} is not what was written")
    tensors = {path.stem: load_file(path) for path in sorted(directory.glob("*.safetensors"))}
    return Snapshot(step, tensors, json.loads((directory / STATE).read_bytes()))


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
