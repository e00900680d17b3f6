"""What the front and the worker say to each other, as frames.

front  -> worker   load      which model, where, in what numerics
worker -> front    born      the worker's process id, at once
worker -> front    note      a line for the log while it loads
worker -> front    ready     the model, once a real score has passed   | refused   it cannot be served, and why
front  -> worker   batch     prompt groups as flat arrays
worker -> front    scores    attributes, seconds of compute, late JIT  | failed    the forward raised
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plaudit_model.packing import Group

from .domain import ModelInfo
from .link import Array, Frame, LinkError

Attributes = NDArray[np.float32]


@dataclass(frozen=True)
class LoadOrder:
    """What the worker is to load; None means what the contract, or torch, says. It warms up for batches of
    `token_budget`, runs on these `cpus` alone, a thread each, if any are named, and takes no more than `memory_cap`
    bytes. It is one of `workers` that divide torch's threads among them, where neither threads nor CPUs are named."""

    model: str
    device: str
    dtype: str | None
    mode: str | None
    threads: int | None
    token_budget: int = 4096
    cpus: tuple[int, ...] = ()
    memory_cap: int | None = None
    workers: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """`attributes` (N, A), in the order of the batch's rows; non-finite where the model gave that. `late_jit`: the
    kernels that were compiled since the last scores. `unfit`: the rows that do not fit into memory alone. `token_cap`:
    the largest batch that the worker computes in one piece, once it has run out of memory over a larger one."""

    attributes: Attributes
    seconds: float
    late_jit: tuple[str, ...] = ()
    unfit: tuple[int, ...] = ()
    token_cap: int | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """The forward raised. `reason` is the exception in one line; it may not hold user text."""

    reason: str


def load_frame(order: LoadOrder) -> Frame:
    return Frame("load", dataclasses.asdict(order))


def load_order(frame: Frame) -> LoadOrder:
    with _reading(frame, "load") as fields:
        return LoadOrder(**{**fields, "cpus": tuple(fields["cpus"])})


def born_frame(pid: int) -> Frame:
    return Frame("born", {"pid": pid})


def born_pid(frame: Frame) -> int:
    with _reading(frame, "born") as fields:
        return int(fields["pid"])


def note_frame(line: str) -> Frame:
    return Frame("note", {"line": line})


def note(frame: Frame) -> str | None:
    """The line for the log, if that is what the frame is."""
    if frame.kind != "note":
        return None
    with _reading(frame, "note") as fields:
        return str(fields["line"])


def ready_frame(info: ModelInfo) -> Frame:
    return Frame("ready", dataclasses.asdict(info))


def model_info(frame: Frame) -> ModelInfo:
    with _reading(frame, "ready") as fields:
        return ModelInfo(**{**fields, "attributes": tuple(fields["attributes"])})


def refused_frame(message: str) -> Frame:
    return Frame("refused", {"message": message})


def refusal(frame: Frame) -> str | None:
    """Why the model cannot be served, if that is what the frame says."""
    if frame.kind != "refused":
        return None
    with _reading(frame, "refused") as fields:
        return str(fields["message"])


def batch_frame(groups: Sequence[Group]) -> Frame:
    """Groups as flat arrays; their `indices` are not sent, rows are answered in the order of the groups."""
    pieces = [piece for group in groups for piece in (group.prefix, *group.suffixes)]
    return Frame("batch", arrays={
        "ids": np.concatenate(pieces),
        "prefix_lengths": _int32(len(group.prefix) for group in groups),
        "group_sizes": _int32(len(group.suffixes) for group in groups),
        "suffix_lengths": _int32(len(suffix) for group in groups for suffix in group.suffixes),
        "boundaries": _int32(boundary for group in groups for boundary in group.boundaries),
    })  # fmt: skip


def batch_groups(frame: Frame) -> list[Group]:
    """The groups of a batch frame; `indices` count through all of them. Raises LinkError."""
    with _reading(frame, "batch"):
        ids = frame.arrays["ids"].astype(np.int32, copy=False)
        names = ("prefix_lengths", "group_sizes", "suffix_lengths", "boundaries")
        prefixes, sizes, lengths, boundaries = (frame.arrays[name].tolist() for name in names)
        if len(prefixes) != len(sizes) or sum(sizes) != len(lengths) or len(lengths) != len(boundaries):
            raise ValueError("the groups do not add up")
        if sum(prefixes) + sum(lengths) != len(ids) or min([*prefixes, *lengths]) < 0:
            raise ValueError("the tokens do not add up")
    return _cut(ids, prefixes, sizes, lengths, boundaries)


def scores_frame(scores: Scores) -> Frame:
    fields = {"seconds": scores.seconds, "late_jit": scores.late_jit, "token_cap": scores.token_cap}
    arrays: dict[str, Array] = {"attributes": scores.attributes.reshape(-1), "unfit": _int32(scores.unfit)}
    return Frame("scores", fields | {"columns": scores.attributes.shape[1]}, arrays)


def failed_frame(failure: Failure) -> Frame:
    return Frame("failed", {"reason": failure.reason})


def reply(frame: Frame, rows: int) -> Scores | Failure:
    """The answer to a batch of `rows` sequences. Raises LinkError."""
    if frame.kind == "failed":
        with _reading(frame, "failed") as fields:
            return Failure(str(fields["reason"]))
    with _reading(frame, "scores") as fields:
        flat, columns = frame.arrays["attributes"], int(fields["columns"])
        if columns < 1 or len(flat) != rows * columns:
            raise ValueError(f"{len(flat)} numbers for {rows} sequences of {columns} attributes")
        attributes = flat.astype(np.float32, copy=False).reshape(rows, columns)
        unfit, cap = tuple(frame.arrays["unfit"].tolist()), fields["token_cap"]
        if cap is not None and int(cap) < 1:
            raise ValueError(f"a batch of {cap} tokens")
        return Scores(attributes, float(fields["seconds"]), tuple(map(str, fields["late_jit"])), unfit, cap)


def _cut(
    ids: NDArray[np.int32], prefixes: list[int], sizes: list[int], lengths: list[int], boundaries: list[int]
) -> list[Group]:
    groups, row, first = [], 0, 0
    for prefix, size in zip(prefixes, sizes, strict=True):
        ends = row + prefix + np.cumsum([0, *lengths[first : first + size]])
        suffixes = tuple(ids[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True))
        members = slice(first, first + size)
        groups.append(Group(
            ids[row : row + prefix], suffixes, tuple(range(first, first + size)), tuple(boundaries[members])
        ))  # fmt: skip
        row, first = int(ends[-1]), first + size
    return groups


def _int32(values: Iterable[int]) -> NDArray[np.int32]:
    return np.fromiter(values, dtype=np.int32)


@contextmanager
def _reading(frame: Frame, kind: str) -> Iterator[Mapping[str, Any]]:
    """The fields of a frame that should be of this kind; whatever is wrong with them is a LinkError."""
    if frame.kind != kind:
        raise LinkError(f"expected a {kind} frame, got {frame.kind}")
    try:
        yield frame.fields
    except (KeyError, TypeError, ValueError) as error:
        raise LinkError(f"a {kind} frame is not what it should be: {error}") from error
