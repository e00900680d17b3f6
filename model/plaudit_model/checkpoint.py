"""Checkpoints of a run: whole directories that are either there and right, or not there.

    step-00000128/   <name>.safetensors...  state.json  manifest.json

Protocol of a save: a hidden directory beside its destination, every file written and synced, the manifest
with everybody's sha256 last, the directory synced, one rename, the parent synced; only then are older ones
pruned, by renaming them out of sight before deleting. A kill between any two instructions leaves the newest
complete checkpoint where it was. (Pillai et al., OSDI 2014, on what file systems may reorder.)

The reader verifies every hash and falls back, loudly, to the checkpoint before. Nothing here can run code.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import CheckpointError
from .store import hash_file, sync

LOG = logging.getLogger("plaudit.checkpoint")

FORMAT = 1
SAVE_SHARE = 0.02
SHORTEST_INTERVAL = 30.0
MOST_FAILURES = 3
MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_HIDDEN = (".writing-", ".pruned-")

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All there is to know of a run after `step` steps: named tensors by file (as `model`, `optimizer`, `rng`) and a
    JSON object."""

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
        if step == 0 or step == self.saved_at:
            return False
        return step % self._every == 0 if self._every else time.monotonic() >= self._next

    def save(self, snapshot: Snapshot, best: int | None = None) -> None:
        """Save. A failure is an alarm and the run goes on from it; the third in a row is raised, OSError."""
        begun = time.monotonic()
        try:
            save(self._root, snapshot, keep=self._keep, best=best)
            self.saved_at, self._failures = snapshot.step, 0
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
            self._failures += 1
            if self._failures >= MOST_FAILURES:
                raise OSError(str(error)) from error
            LOG.error("no checkpoint at step %d, the one before is intact: %s", snapshot.step, error)
        now = time.monotonic()
        self._next = now + max(SHORTEST_INTERVAL, (now - begun) / SAVE_SHARE)


def save(root: Path, snapshot: Snapshot, *, keep: int, best: int | None = None) -> Path:
    """Write a checkpoint under `root`, then prune to the `keep` newest and the one of step `best`.

    Raises OSError when it cannot be written (full, read-only); what was there before is untouched, and
    nothing half-written is left.
    """
    root.mkdir(parents=True, exist_ok=True)
    clean(root)
    _require_space(root, snapshot)
    hidden, final = root / f"{_HIDDEN[0]}{os.getpid()}", place(root, snapshot.step)
    try:
        hidden.mkdir()
        _write_files(hidden, snapshot)
        if final.exists():  # of the same step: deleted when its successor is there, as that may take seconds
            os.rename(final, root / f"{_HIDDEN[1]}{final.name}")
        os.rename(hidden, final)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    sync(root)
    clean(root)
    prune(root, keep=keep, best=best)
    return final


def load_tensors(mine: Tensors, tensors: Tensors) -> None:
    """Write the tensors of a checkpoint into these. Raises CheckpointError if the names differ."""
    if odd := sorted(mine.keys() ^ tensors.keys()):
        raise CheckpointError(f"the checkpoint is of another model: {odd[0]} is only on one side")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])


def prune(root: Path, *, keep: int, best: int | None = None) -> None:
    """Remove all but the `keep` newest checkpoints and the one of step `best`."""
    for step, directory in list(steps(root).items())[keep:]:
        if step != best:
            _remove(directory)


def clean(root: Path) -> None:
    """Remove what an earlier process left behind: half-written and half-deleted directories."""
    for entry in root.glob(".*"):
        if entry.name.startswith(_HIDDEN):
            shutil.rmtree(entry, ignore_errors=True)


def place(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, if there is one."""
    return root / f"step-{step:08d}"


def steps(root: Path) -> dict[int, Path]:
    """Checkpoint directories by step, newest first. Not verified."""
    found = {int(m[1]): entry for entry in root.glob("step-*") if (m := _NAME.fullmatch(entry.name))}
    return dict(sorted(found.items(), reverse=True))


def newest(root: Path) -> Snapshot | None:
    """The newest checkpoint that verifies, None if there is none at all.

    A damaged one on the way is named in a warning and set aside as `damaged-step-...`, so that it does not count
    as one of those to keep. Raises CheckpointError if there are some and all are damaged.
    """
    found, damaged = steps(root), list[Path]()
    for directory in found.values():
        try:
            snapshot = load(directory)
        except CheckpointError as error:
            LOG.warning("%s; falling back to the checkpoint before it", error)
            damaged.append(directory)
            continue
        for other in damaged:
            _set_aside(other)
        return snapshot
    if found:
        raise CheckpointError(f"all {len(found)} checkpoints in {root} are damaged; start again with another --out")
    return None


def load(directory: Path) -> Snapshot:
    """One checkpoint, every byte verified. Raises CheckpointError, naming the file, if anything differs."""
    step = _verify(directory)
    state = json.loads((directory / STATE).read_text(encoding="utf-8"))
    tensors = {path.stem: load_file(path) for path in sorted(directory.glob("*.safetensors"))}
    return Snapshot(step, tensors, state)


def _verify(directory: Path) -> int:
    """The step of a checkpoint whose files are exactly those of its manifest."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        version, step, files = manifest.get("format", FORMAT), manifest["step"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {directory} is damaged: its {MANIFEST} cannot be read") from error
    if version != FORMAT or directory != place(directory.parent, step):
        raise CheckpointError(f"checkpoint {directory} is damaged: its {MANIFEST} is of another checkpoint")
    there = {entry.name for entry in directory.iterdir()} - {MANIFEST}
    if odd := sorted(there ^ set(files)):
        raise CheckpointError(f"checkpoint {directory} is damaged: {odd[0]} is missing or was added")
    for name, expected in files.items():
        if _entry(directory / name) != expected:
            raise CheckpointError(f"checkpoint {directory} is damaged: {name} is not what was written")
    return int(step)


def _write_files(directory: Path, snapshot: Snapshot) -> None:
    for name, tensors in snapshot.tensors.items():
        path = directory / f"{name}.safetensors"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        sync(path)
    _write_json(directory / STATE, snapshot.state)
    files = {path.name: _entry(path) for path in sorted(directory.iterdir())}
    _write_json(directory / MANIFEST, {"format": FORMAT, "step": snapshot.step, "files": files})
    sync(directory)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    sync(path)


def _entry(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as the manifest has them. Raises CheckpointError if it cannot be read."""
    try:
        return asdict(hash_file(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _require_space(root: Path, snapshot: Snapshot) -> None:
    """Ask before writing: a full disk found half-way costs the time of the half."""
    needed = sum(t.numel() * t.element_size() for tensors in snapshot.tensors.values() for t in tensors.values())
    if shutil.disk_usage(root).free < 1.2 * needed:
        raise OSError(errno.ENOSPC, f"a checkpoint needs {1.2 * needed / 1e6:.0f} MB free", str(root))


def _set_aside(directory: Path) -> None:
    """Keep a damaged checkpoint for its owner to look at, under a name that no reader takes."""
    aside = directory.with_name(f"damaged-{directory.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(directory, aside)


def _remove(directory: Path) -> None:
    """Delete a checkpoint; a kill half-way never leaves a part of one under its name."""
    hidden = directory.with_name(f"{_HIDDEN[1]}{directory.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(directory, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
