"""The schema of `rewards.toml`: the terms, and how their values are put together. Pure, but for reading the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .._checked import is_number
from .._config import table_of
from .._row_files import digest
from ..errors import ConfigurationError
from . import patterns

ENDS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "<eos>", "</s>")
"""What ends a response in the text of well-known templates."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """What all terms have. `clip`: the lowest and the highest value that counts. `required`: a value below `least`
    (1 for terms that are 0 or 1) makes the reward the floor. `reference_field`: the field of a reference that is an
    object."""

    name: str
    weight: float = 1.0
    clip: list[float] | None = None
    required: bool = False
    least: float | None = None
    reference_field: str | None = None


@dataclass(frozen=True, kw_only=True)
class Model(Term):
    """The score of a plaudit server. `seconds`: for a request, retries included; `attempt_seconds`: for one
    attempt, automatic if it is not given."""

    url: str
    model: str | None = None
    revision: str | None = None
    seconds: float = 120.0
    attempt_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Exact(Term):
    """1 if the answer is the reference, or one of a list of them, white space evened out, and case too unless
    `case`. The answer is the last match of `extract` (its first group, if it has one), else the whole response."""

    extract: str | None = None
    case: bool = False


@dataclass(frozen=True, kw_only=True)
class Numeric(Term):
    """1 if the number of the response is the reference's, within `tolerance` or `relative` times the reference."""

    tolerance: float = 0.0
    relative: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Regex(Term):
    """1 if the pattern is found in the response; `whole`: if it matches all of it. A response on which it backtracks
    without end has no value."""

    pattern: str
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class JsonSchema(Term):
    """1 if the response, or its last ```json block, is JSON that fits the schema (draft 2020-12)."""

    schema: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Length(Term):
    """Minus the number of units beyond `limit`; the weight is the penalty of one. `tokens` are those that the model
    term named `of` counted: prompt, template and response."""

    limit: int
    unit: Literal["characters", "words", "tokens"] = "characters"
    of: str | None = None


@dataclass(frozen=True, kw_only=True)
class Code(Term):
    """The share of the reference's tests that the program in the response passes: a list of {"input", "output"},
    given on standard input and compared with standard output, or a text of assertions that all must hold."""

    seconds: float = 10.0
    memory_mb: int = 512


KINDS: Mapping[str, type[Term]] = {
    "model": Model, "exact": Exact, "numeric": Numeric, "regex": Regex, "json_schema": JsonSchema, "length": Length,
    "code": Code,
}  # fmt: skip
_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,), "float": (int, float), "int": (int,), "bool": (bool,), "dict[str, Any]": (dict,),
    "list[float]": (list,),
}  # fmt: skip


@dataclass(frozen=True)
class Rewards:
    """What `rewards.toml` holds. `ends`: texts that are cut from the end of a rendered response."""

    terms: tuple[Term, ...]
    name: str = "composed"
    floor: float = -10.0
    ends: tuple[str, ...] = ENDS
    sha256: str = field(default="", compare=False)

    def combine(self, values: Mapping[str, float]) -> tuple[float, str | None]:
        """The reward of these values, and the required term that made it the floor, if one did. Raises ValueError if
        it is not finite."""
        total = math.fsum(term.weight * _clipped(values[term.name], term.clip) for term in self.terms)
        if not math.isfinite(total):
            raise ValueError("the reward is not finite")
        failed = (t.name for t in self.terms if t.required and values[t.name] < (1.0 if t.least is None else t.least))
        gate = next(failed, None)
        return (total, None) if gate is None else (self.floor, gate)


def read_rewards(path: Path) -> Rewards:
    """The rewards in a TOML file. Raises ConfigurationError, naming the term and what is wrong with it."""
    table = table_of(path)
    terms = table.pop("terms", None)
    try:
        if not isinstance(terms, list) or not terms:
            raise ValueError("there are no [[terms]]")
        if unknown := table.keys() - {"name", "floor", "ends"}:
            raise ValueError(f"unknown key {min(unknown)!r}; known: name, floor, ends, [[terms]]")
        rewards = Rewards(tuple(_term(dict(term)) for term in terms), **table)
        _check(rewards)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{path}: {error}") from None
    about = asdict(rewards, dict_factory=lambda pairs: {k: v for k, v in pairs if k != "attempt_seconds"})  # no rule
    return Rewards(rewards.terms, rewards.name, float(rewards.floor), tuple(rewards.ends), digest(about))


def _term(table: dict[str, Any]) -> Term:
    kind = table.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"a term's kind is one of {', '.join(KINDS)}, got {kind!r}")
    table.setdefault("name", kind)
    known = {f.name: str(f.type) for f in fields(KINDS[kind])}
    for key, value in table.items():
        if key not in known:
            raise ValueError(f"term {table['name']!r}: unknown key {key!r}; known: {', '.join(known)}")
        wanted = _TYPES.get(known[key].removesuffix(" | None"))
        if wanted and (not isinstance(value, wanted) or (isinstance(value, bool) and wanted != (bool,))):
            raise ValueError(f"term {table['name']!r}: {key} must be {known[key]}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"term {table['name']!r}: {key} must be finite")
    try:
        return KINDS[kind](**table)
    except TypeError as error:
        raise ValueError(f"term {table['name']!r}: {str(error).partition('() ')[2]}") from None


def _check(rewards: Rewards) -> None:
    names = [term.name for term in rewards.terms]
    if not is_number(rewards.floor):
        raise ValueError("floor must be a finite number")
    if not isinstance(rewards.name, str) or not all(isinstance(end, str) and end for end in rewards.ends):
        raise ValueError("name must be a text, ends a list of texts")
    for term in rewards.terms:
        if names.count(term.name) > 1:
            raise ValueError(f"two terms are named {term.name!r}; give each a name")
        try:
            _check_term(term, {t.name for t in rewards.terms if isinstance(t, Model)})
        except ValueError as error:
            raise ValueError(f"term {term.name!r}: {error}") from None


def _check_term(term: Term, models: set[str]) -> None:
    clip = [0.0, 0.0] if term.clip is None else term.clip
    if len(clip) != 2 or not all(map(is_number, clip)) or clip[0] > clip[1]:
        raise ValueError("clip is [lowest, highest]")
    if term.required and term.least is None and isinstance(term, (Model, Length)):
        raise ValueError("its values are not 0 or 1: say the `least` that is required")
    match term:
        case Exact(extract=pattern) | Regex(pattern=pattern) if pattern is not None:
            patterns.compiled(pattern)
        case Numeric() if term.tolerance < 0 or term.relative < 0:
            raise ValueError("a tolerance cannot be negative")
        case Length() if term.limit < 0 or term.unit not in ("characters", "words", "tokens"):
            raise ValueError("limit must not be negative, unit one of characters, words, tokens")
        case Length() if (term.unit == "tokens") != (term.of in models):
            raise ValueError("the unit `tokens`, and it alone, needs `of`, the name of a model term")
        case Code() if term.seconds <= 0 or term.memory_mb < 64:
            raise ValueError("seconds must be positive, memory_mb at least 64")


def _clipped(value: float, clip: list[float] | None) -> float:
    return value if clip is None else min(max(value, clip[0]), clip[1])
