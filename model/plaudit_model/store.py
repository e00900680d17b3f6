"""Checkpoint directories on disk: written whole or not at all, and hashed.

A directory is written beside its final name, every file is synced, and one rename makes it visible: a crash
leaves the old checkpoint or the new one, never a mixture. `reward.json` holds the sha256 of every other file,
because a flipped bit in a weight file loads without an error. Where a checkpoint is replaced, the old one is set aside
under a hidden name for the moment between two renames.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .contract import FILE_NAME, FileEntry, RewardContract
from .errors import CheckpointError

_LARGE = 1 << 26
_HASHED_AT_ONCE = 8
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A directory to write into, renamed to `target` when the block ends well and removed when it does not.
    An existing `target` is replaced. Whoever may read the directory may read its files. Raises OSError."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.writing-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        for path in sorted(staging.rglob("*"), reverse=True):  # deepest first
            # safetensors lets nobody else read its files, such as the user that a server runs as
            path.chmod(path.stat().st_mode | staging.stat().st_mode & 0o444)
            sync(path)
        sync(staging)
        _replace(staging, target)
    except SafetensorError as error:
        raise OSError(f"{target} could not be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def hash_file(path: Path) -> FileEntry:
    """sha256 and size of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileEntry(digest, path.stat().st_size)


def hash_files(directory: Path, patterns: Iterable[str] = ("*",)) -> dict[str, FileEntry]:
    """The files of a checkpoint directory that match one of the patterns, but not the contract itself."""
    found = {path for pattern in patterns for path in directory.rglob(pattern)}
    paths = [path for path in sorted(found) if path.is_file() and path.name != FILE_NAME]
    return {path.relative_to(directory).as_posix(): entry for path, entry in zip(paths, _hashed(paths), strict=True)}


def _hashed(paths: Iterable[Path]) -> list[FileEntry]:
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        return list(pool.map(hash_file, paths))


def check_files(directory: Path, contract: RewardContract) -> None:
    """Raise CheckpointError unless every file that the contract lists is there, as it was written."""
    with checking_files(directory, contract):
        pass


@contextmanager
def checking_files(directory: Path, contract: RewardContract) -> Iterator[None]:
    """The same, large files beside what the block does with them: hashing 16 GB takes as long as loading them. Raises
    before the block for what is missing, has another size or is small, else at its end, whatever the block raised."""
    for name, expected in contract.files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {FILE_NAME} lists it")
        if expected.bytes < _LARGE or path.stat().st_size != expected.bytes:
            _check_file(path, expected)
    large = [name for name, expected in contract.files.items() if expected.bytes >= _LARGE]
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        checks = [pool.submit(_check_file, directory / name, contract.files[name]) for name in large]
        try:
            yield
        except Exception:
            _await(checks)  # what was wrong with the files explains what they led to
            raise
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        _await(checks)


def _await(checks: Iterable[Future[None]]) -> None:
    for check in checks:
        check.result()


def _check_file(path: Path, expected: FileEntry) -> None:
    if path.stat().st_size != expected.bytes or hash_file(path) != expected:
        raise CheckpointError(f"{path} is not the file that {FILE_NAME} was written for (sha256 differs)")


def weights_identity(directory: Path) -> dict[str, Any]:
    """What tells a base from another: the sha256 of its configuration and of each of its weight files."""
    config = directory / "config.json"
    paths = sorted(directory.glob("*.safetensors"))
    weights = {path.name: entry.sha256 for path, entry in zip(paths, _hashed(paths), strict=True)}
    return {"config": hash_file(config).sha256 if config.is_file() else None, "weights": weights}


def check_weights(directory: Path) -> None:
    """Raise CheckpointError unless the weights are safetensors: pickle runs code when it is loaded."""
    if any(directory.glob("*.safetensors")):
        return
    pickled = [path.name for path in directory.iterdir() if path.suffix in _PICKLE_SUFFIXES]
    if pickled:
        raise CheckpointError(f"{directory} has only pickle weights ({pickled[0]}); convert them to safetensors first")
    raise CheckpointError(f"{directory} has no *.safetensors weights")


def _replace(staging: Path, target: Path) -> None:
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    if target.exists():
        target.rename(old)
    staging.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or a directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
