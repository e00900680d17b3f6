"""A load profile: the traffic, the three shapes, and the objectives that decide whether the run passed.

Profiles are TOML files in `profiles/`; a key that is not a field below is an error.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from traffic import TrafficSettings

SHAPES = ("storm", "batch", "best_of_n")

T = TypeVar("T")


class ProfileError(ValueError):
    """The profile cannot be used; the message names the file and the key."""

    exit_code = 78


@dataclass(frozen=True)
class Storm:
    """Rollouts that finish one by one: `samples` of a prompt are posted each alone, at the moment the policy (at
    `words_per_second` a response) has written it; a new prompt begins every `step_seconds`."""

    samples: int = 8
    words_per_second: float = 40.0
    step_seconds: float = 2.0


@dataclass(frozen=True)
class Batch:
    """One list of `items` per rank and step, `samples` of each prompt in it; a step lasts `step_seconds`."""

    items: int = 512
    samples: int = 4
    step_seconds: float = 5.0


@dataclass(frozen=True)
class BestOfN:
    """One prompt with `responses` responses, every `step_seconds`."""

    responses: int = 16
    step_seconds: float = 1.0


@dataclass(frozen=True)
class Slo:
    """The objectives. `p99_ms` is per shape: milliseconds of the whole request; a shape that is named there and gets
    no answer misses it. `error_rate` is the share of requests
    that may fail, `items_per_second` what all shapes together must reach. Wrong scores are never allowed."""

    items_per_second: float
    error_rate: float = 0.0
    p99_ms: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.p99_ms or ()) - set(SHAPES):
            raise ValueError(f"p99_ms: no shape {min(unknown)!r}; shapes: {', '.join(SHAPES)}")


@dataclass(frozen=True)
class Profile:
    """One file of `profiles/`."""

    name: str
    traffic: TrafficSettings
    storm: Storm
    batch: Batch
    best_of_n: BestOfN
    slo: Slo

    def items_per_request(self, shape: str) -> int:
        return {"storm": 1, "batch": self.batch.items, "best_of_n": self.best_of_n.responses}[shape]


@dataclass(frozen=True)
class Measured:
    """What one shape did. Times in milliseconds; `items` were scored by requests that did not fail."""

    shape: str
    requests: int
    failures: int
    wrong: int
    items: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    p99_ms: float


def read_profile(path: Path) -> Profile:
    """The profile of a TOML file. Raises ProfileError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        sections = {"traffic": TrafficSettings, "storm": Storm, "batch": Batch, "best_of_n": BestOfN, "slo": Slo}
        if unknown := set(data) - set(sections):
            raise ValueError(f"unknown section [{min(unknown)}]; sections: {', '.join(sections)}")
        built: dict[str, Any] = {name: _section(kind, name, data.get(name, {})) for name, kind in sections.items()}
    except (OSError, ValueError, TypeError) as error:
        raise ProfileError(f"{path}: {error}") from error
    return Profile(name=path.stem, **built)


def violations(slo: Slo, measured: Sequence[Measured], seconds: float) -> list[str]:
    """One line for each objective that was missed; empty when the run passed. A run without requests fails."""
    requests = sum(m.requests for m in measured)
    if requests == 0 or seconds <= 0:
        return ["nothing was measured"]
    missed = [f"{m.shape}: {m.wrong} wrong answers" for m in measured if m.wrong]
    failed = sum(m.failures for m in measured) / requests
    if failed > slo.error_rate:
        missed.append(f"error rate {failed:.4f} above {slo.error_rate:.4f}")
    rate = sum(m.items for m in measured) / seconds
    if rate < slo.items_per_second:
        missed.append(f"{rate:.1f} items/s below {slo.items_per_second:.1f}")
    for m in measured:
        limit = (slo.p99_ms or {}).get(m.shape)
        if limit is None:
            continue
        if m.requests == m.failures:
            missed.append(f"{m.shape}: no answer, so no p99 to hold against {limit:.0f} ms")
        elif m.p99_ms > limit:
            missed.append(f"{m.shape}: p99 {m.p99_ms:.0f} ms above {limit:.0f} ms")
    return missed


def _section(kind: type[T], name: str, data: Mapping[str, Any]) -> T:
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := set(data) - set(known):
        raise ValueError(f"[{name}]: unknown key {min(unknown)!r}; keys: {', '.join(known)}")
    return kind(**data)
