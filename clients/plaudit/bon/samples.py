"""Samples on disk: what a sample is, its key, and files of samples that are continued and merged."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .._items import check, encode
from .._jsonl import readable
from ..errors import InvalidInput, OutputFailed
from ..types import Prompt

_BEGINNING = b'{"key":"'


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are sampled. `batch_size`: samples of a prompt that are computed together, on which floating
    point depends. `raw`: the prompt is text to be continued, not a user's message."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0
    batch_size: int = 16
    raw: bool = False


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt, the line that it stands on, and the other fields of its row."""

    line: int
    prompt: Prompt
    source: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Generated:
    """What became of one sample: a response, or why there is none (`failure`: code and message)."""

    response: str | None
    finish_reason: str | None = None
    tokens: int | None = None
    failure: Mapping[str, str] | None = None


class Policy(Protocol):
    """`sample` gives one `Generated` for each of the keys, which are those of one prompt, one after another. `name`
    says which weights these are, and is part of the keys. `ahead`: how many calls may run at the same time."""

    name: str
    ahead: int

    def sample(self, prompt: Prompt, keys: Sequence[str]) -> list[Generated]: ...
    def close(self) -> None: ...


def digest(value: Any) -> str:
    """sha256 of a JSON value in hexadecimal, whatever the order of the fields of its objects."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sample_key(prompt: Any, settings: Any, index: Any) -> str:
    """The key of a sample: a hash of everything that it depends on. `settings`: the policy and the sampling."""
    return digest([prompt, settings, index])[:32]


def sample_line(row: PromptRow, index: int, key: str, settings: Mapping[str, Any], made: Generated) -> bytes:
    """The line of a sample. What else stood in the prompt's row is kept under `source`."""
    what = {name: value for name, value in asdict(made).items() if value is not None or name == "response"}
    source = {"source": row.source} if row.source else {}
    place = {"key": key, "line": row.line, "index": index, "prompt": row.prompt}
    return encode({**place, **what, "sampling": settings, **source}) + b"\n"


def read_prompts(
    lines: Iterable[bytes], name: str, shard: tuple[int, int] = (0, 1), *, raw: bool = False
) -> tuple[list[PromptRow], int]:
    """The distinct prompts of a file that belong to the shard, and how many were repetitions. All of the file is
    read before the first is used: a bad row stops a run at its start, not after a day. Raises InvalidInput."""
    rows: dict[str, PromptRow] = {}
    repeated = 0
    for number, where, value in json_rows(lines):
        with located(where):
            prompt = value.pop(name, None)
            check({"prompt": prompt, "response": ""})
            encode(value)
            if raw and not isinstance(prompt, str):
                raise InvalidInput("--raw continues text, but this prompt is a list of messages")
        own = digest(prompt)
        if int(own, 16) % shard[1] == shard[0]:
            repeated += own in rows
            rows.setdefault(own, PromptRow(number, prompt, value))
    return list(rows.values()), repeated


def take_up(out: Path, settings: Mapping[str, Any]) -> tuple[set[str], int]:
    """The keys that `out` holds, and how many of its samples have no response; a torn last line is cut off.

    Raises InvalidInput, and changes nothing, unless every line is a sample of these settings under its own key.
    """
    have: set[str] = set()
    failed, complete = 0, 0
    with out.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{out}:{number}"
            if not line.endswith(b"\n") and line[: len(_BEGINNING)] == _BEGINNING[: len(line)]:
                break
            value = json_object(line, where)
            if (other := value.get("sampling")) != settings:
                raise InvalidInput(f"{where} has the settings {other}, not {settings}; use another --out")
            key = sample_key(value.get("prompt"), settings, value.get("index"))
            if value.get("key") != key or key in have:
                raise InvalidInput(f"{where} repeats a key, or is not the sample that it names; use another --out")
            have.add(key)
            failed += value.get("response") is None
            complete += len(line)
    with out.open("r+b") as file:
        file.truncate(complete)
    return have, failed


def merge(sources: Sequence[Path], write: Callable[[bytes], object]) -> tuple[int, int]:
    """Write the samples of several files in the order of their prompts and indices, as one run without shards
    would have; how many there are, and how many copies were left out. Raises InvalidInput if a line is torn, or two
    lines share a key and differ."""
    places: dict[str, tuple[int, int, str, int, int]] = {}
    hashes: dict[str, bytes] = {}
    copies = 0
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in sources]
        for number, file in enumerate(files):
            offset = 0
            for count, line in enumerate(file, start=1):
                where = f"{sources[number]}:{count}"
                value = json_object(line, where)
                place, index, key = value.get("line"), value.get("index"), value.get("key")
                if not (line.endswith(b"\n") and type(place) is type(index) is int and isinstance(key, str)):
                    raise InvalidInput(f"{where} is no whole line of a sample, with line, index and key")
                if hashes.setdefault(key, own := hashlib.sha256(line).digest()) != own:
                    raise InvalidInput(f"{where} has the key {key} of an earlier line and differs from it")
                copies += key in places
                places.setdefault(key, (place, index, key, number, offset))
                offset += len(line)
        for *_, number, offset in sorted(places.values()):
            files[number].seek(offset)
            write(files[number].readline())
    return len(places), copies


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """No other run of ours appends to the file. It is made if it is not there. Raises InvalidInput."""
    try:
        file = out.open("ab")
    except OSError as error:
        raise InvalidInput(f"{out} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(f"{out} is being written by another run; wait for it, or choose another --out") from None
        yield


@contextmanager
def whole_file(out: Path) -> Iterator[Callable[[bytes], object]]:
    """What writes to a file that appears under its name when the block ends well, and not before. Raises InvalidInput
    if there can be no such file, OutputFailed if it cannot be written to its end."""
    staging = out.with_name(f".{out.name}.writing-{os.getpid()}")
    try:
        opened = staging.open("wb")
    except OSError as error:
        raise InvalidInput(f"{out} cannot be written: {error.strerror}") from None
    try:
        with opened as file:
            yield file.write
            file.flush()
            os.fsync(file.fileno())
        staging.replace(out)
    except OSError as error:
        raise OutputFailed(f"{out} cannot be written: {error.strerror}") from None
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def located(where: str) -> Iterator[None]:
    """What is wrong with a value in there is an InvalidInput that says where it stood."""
    try:
        yield
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{where}: {error}") from None


def json_rows(lines: Iterable[bytes]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The rows of a JSONL file with their line numbers, as a number and as words. Raises InvalidInput."""
    for number, line in enumerate(readable(lines), start=1):
        if line.strip():
            yield number, f"line {number}", json_object(line, f"line {number}")


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """The object on a line. Raises InvalidInput."""
    with located(where):
        value = json.loads(line)
        if not isinstance(value, dict):
            raise TypeError(f"not a JSON object, but {type(value).__name__}")
    return value
