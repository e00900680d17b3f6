"""Samples on disk: what a sample is, its key, and files of samples that are continued and merged."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from .. import _row_files as row_files
from .._items import check, encode
from .._row_files import digest, json_object, json_rows, located
from ..errors import InvalidInput
from ..types import Prompt


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
    """A prompt, the line that it stands on, the other fields of its row, and how many prompts all shards have."""

    line: int
    prompt: Prompt
    source: Mapping[str, Any] = field(default_factory=dict)
    prompts: int = 0


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


def sample_key(prompt: Any, settings: Any, index: Any) -> str:
    """The key of a sample: a hash of everything that it depends on. `settings`: the policy and the sampling."""
    return digest([prompt, settings, index])[:32]


def sample_line(row: PromptRow, index: int, key: str, settings: Mapping[str, Any], made: Generated) -> bytes:
    """The line of a sample. What else stood in the prompt's row is kept under `source`."""
    what = {name: value for name, value in asdict(made).items() if value is not None or name == "response"}
    source = {"source": row.source} if row.source else {}
    place = {"key": key, "line": row.line, "index": index, "prompt": row.prompt}
    return encode({**place, **what, "sampling": settings, **source, "prompts": row.prompts}) + b"\n"


def read_prompts(
    lines: Iterable[bytes], name: str, shard: tuple[int, int] = (0, 1), *, raw: bool = False
) -> tuple[list[PromptRow], int]:
    """The distinct prompts of a file that belong to the shard, and how many were repetitions. All of the file is
    read before the first is used: a bad row stops a run at its start, not after a day. Raises InvalidInput."""
    rows: dict[str, PromptRow] = {}
    repeated, every = 0, set[str]()
    for number, where, value in json_rows(lines):
        with located(where):
            prompt = value.pop(name, None)
            check({"prompt": prompt, "response": ""})
            encode(value)
            if raw and not isinstance(prompt, str):
                raise InvalidInput("--raw continues text, but this prompt is a list of messages")
        every.add(own := digest(prompt))
        if int(own, 16) % shard[1] == shard[0]:
            repeated += own in rows
            rows.setdefault(own, PromptRow(number, prompt, value))
    return [replace(row, prompts=len(every)) for row in rows.values()], repeated


def take_up(out: Path, settings: Mapping[str, Any]) -> tuple[set[str], int]:
    """The keys that `out` holds, and how many of its samples have no response; a torn last line is cut off.

    Raises InvalidInput, and changes nothing, unless every line is a sample of these settings under its own key.
    """

    def check(row: Mapping[str, Any]) -> str | None:
        if (other := row.get("sampling")) != settings:
            return f"has the settings {other}, not {settings}"
        key = sample_key(row.get("prompt"), settings, row.get("index"))
        return None if row.get("key") == key else "is not the sample that it names"

    rows = [(row["key"], row.get("response") is None) for row in row_files.take_up(out, check)]
    return {key for key, _ in rows}, sum(failed for _, failed in rows)


def merge(sources: Sequence[Path], write: Callable[[bytes], object]) -> tuple[int, int, list[str]]:
    """Write the samples of several files in the order of their prompts and indices, as one run without shards
    would have; how many there are, how many copies were left out, and what is missing. Raises InvalidInput if a line
    is torn, or two lines share a key and differ."""
    places: dict[str, tuple[int, int, str, int, int]] = {}
    hashes: dict[str, bytes] = {}
    copies, samples = 0, defaultdict[str, Counter[str]](Counter)  # by settings: how many each prompt has
    wanted: dict[str, Sequence[int]] = {}  # by settings: prompts, samples of each
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in sources]
        for number, file in enumerate(files):
            offset = 0
            for count, line in enumerate(file, start=1):
                where = f"{sources[number]}:{count}"
                value = json_object(line, where)
                place, index, key = value.get("line"), value.get("index"), value.get("key")
                prompts = value.pop("prompts", 0)  # which may have been fewer when an equal sample was made
                if not (line.endswith(b"\n") and type(place) is type(index) is int and isinstance(key, str)):
                    raise InvalidInput(f"{where} is no whole line of a sample, with line, index and key")
                if hashes.setdefault(key, own := hashlib.sha256(encode(value)).digest()) != own:
                    raise InvalidInput(f"{where} has the key {key} of an earlier line and differs from it")
                copies += key in places
                if key not in places:
                    settings = digest(value.get("sampling"))
                    samples[settings][digest(value.get("prompt"))] += 1
                    if type(prompts) is int and prompts:  # older rows say nothing, and are samples of theirs
                        wanted[settings] = tuple(map(max, wanted.get(settings, (0, 0)), (prompts, index + 1)))
                places.setdefault(key, (place, index, key, number, offset))
                offset += len(line)
        for *_, number, offset in sorted(places.values()):
            files[number].seek(offset)
            write(files[number].readline())
    few = sum(count < most for own, (_, most) in wanted.items() for count in samples[own].values())
    none = sum(max(0, prompts - len(samples[own])) for own, (prompts, _) in wanted.items())
    said = {"prompts have no sample": none, "prompts have too few samples": few}
    return len(places), copies, [f"{count} {what}" for what, count in said.items() if count > 0]
