"""The reward contract: what must be known to turn a checkpoint directory into scores.

`reward.json` lies beside the weights. Training writes it, `verify` and `export` complete it, the server obeys
it. The classes below are its schema: an unknown key is an error, and `json_schema()` derives the published
JSON Schema from them, so the two cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from .errors import ContractError
from .json_lines import write_whole

SCHEMA_VERSION = 1
FILE_NAME = "reward.json"
ADAPTER_FILE = "adapter_config.json"
"""The file by which a directory with a LoRA adapter is known; its weights are an addition to those of a base."""


EIGHT_BITS = ("fp8", "int8")
_DTYPES = {"torch": ("float32", "bfloat16", *EIGHT_BITS), "onnx": ("float32", "int8")}


@dataclass(frozen=True)
class Head:
    """Which numbers the model gives. `attributes` names the columns of the head; `score` is the first."""

    kind: Literal["sequence"] = "sequence"
    attributes: tuple[str, ...] = ("score",)


@dataclass(frozen=True)
class Template:
    """How a conversation becomes text. `source` is Jinja.

    chat  the template renders the whole conversation, as in `tokenizer.apply_chat_template`
    pair  the template renders the prompt; prompt and response are encoded as a pair of texts, as a
          cross-encoder's tokenizer does (`[CLS] prompt [SEP] response [SEP]`)
    """

    kind: Literal["chat", "pair"]
    source: str
    sha256: str

    @classmethod
    def of(cls, kind: Literal["chat", "pair"], source: str) -> Template:
        return cls(kind, source, _sha256(source))


@dataclass(frozen=True)
class Tokens:
    """Which tokens are added around the text.

    bos     `template`: only what the template writes. `add`: the tokenizer's BOS in front unless it is there.
    suffix  token ids appended after the response, for models that were trained with them.
    """

    bos: Literal["template", "add"] = "template"
    suffix: tuple[int, ...] = ()


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of the raw scores over `n` responses of the evaluation split."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Calibration:
    """P(a better than b) = sigmoid((a - b) / temperature), fitted on the evaluation split."""

    temperature: float


@dataclass(frozen=True)
class Serving:
    """Backend, dtype and mode that this checkpoint is served in by default; `plaudit verify --write` changes dtype
    and mode. Backend `onnx`, in float32 or int8, is ONNX Runtime over the `model.onnx` that `plaudit model export`
    wrote: its dtype is that of the graph. With torch `fp8` rounds the weights of the layers, and what they multiply,
    to 8 bits, `int8` the weights alone; the rest is bf16."""

    backend: Literal["torch", "onnx"] = "torch"
    dtype: Literal["float32", "bfloat16", "fp8", "int8"] = "float32"
    mode: Literal["exact", "fast"] = "exact"

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            if getattr(self, name) not in get_args(kind):
                raise ContractError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if self.dtype not in _DTYPES[self.backend]:
            raise ContractError(
                f"backend {self.backend} serves {' or '.join(_DTYPES[self.backend])}, not {self.dtype}; the model that "
                "was exported serves float32, bfloat16, fp8 or int8"
            )


@dataclass(frozen=True)
class FileEntry:
    """One file of the directory."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class RewardContract:
    """`reward.json`. `pooling` is a position, never a token id: `last` is the last token of the sequence,
    `first` its first. `lineage` and `evaluation` are records for people: free JSON objects."""

    architecture: str
    template: Template
    max_length: int
    pooling: Literal["last", "first"]
    schema_version: int = SCHEMA_VERSION
    head: Head = Head()
    tokens: Tokens = Tokens()
    truncation: Literal["prompt"] = "prompt"
    reasoning: Literal["keep"] = "keep"
    tools: Literal["error"] = "error"
    statistics: Statistics | None = None
    calibration: Calibration | None = None
    serving: Serving = Serving()
    label: str = ""
    lineage: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ContractError(
                f"reward.json has schema_version {self.schema_version}; this plaudit reads {SCHEMA_VERSION}"
            )
        if self.max_length < 1:
            raise ContractError(f"max_length must be at least 1, got {self.max_length}")
        if self.template.sha256 != _sha256(self.template.source):
            raise ContractError("the template's sha256 is not the hash of its source; was reward.json edited?")
        if not self.head.attributes:
            raise ContractError("head.attributes must name at least one number")
        if self.statistics is not None:
            _check_scale("statistics.std", self.statistics.std)
        if self.calibration is not None:
            _check_scale("calibration.temperature", self.calibration.temperature)

    def revision(self) -> str:
        """Identity of what is scored: a hash of everything but lineage, evaluation and label, so that adding
        a note to a checkpoint does not make it another model. Of an adapter, its base is a part."""
        identity = to_json(self)
        for key in ("lineage", "evaluation", "label"):
            del identity[key]
        if ADAPTER_FILE in self.files:
            identity["base"] = self.base
        return _sha256(json.dumps(identity, sort_keys=True))[:16]

    @property
    def base(self) -> dict[str, Any]:
        """The sha256 of the `config` and the `weights` that this was trained from, as lineage has them."""
        known = self.lineage.get("base")
        return {name: known.get(name) for name in ("config", "weights")} if isinstance(known, dict) else {}


def to_json(value: Any) -> Any:
    """A contract (or a part of one) as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    return value


def from_json(data: Any) -> RewardContract:
    """The contract from parsed JSON.

    Raises ContractError, naming the path of the field, for an unknown key, a missing key or a wrong type.
    """
    contract = _read(RewardContract, data, FILE_NAME)
    assert isinstance(contract, RewardContract)
    return contract


def read(directory: Path) -> RewardContract:
    """The contract of a checkpoint directory. Raises ContractError if it is missing or invalid."""
    path = directory / FILE_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ContractError(f"{directory} has no {FILE_NAME}") from error
    except ValueError as error:
        raise ContractError(f"{path} is not JSON: {error}") from error
    return from_json(data)


def write(contract: RewardContract, directory: Path) -> None:
    """Write `reward.json` into a directory, at once: a reader finds the old one or the new one. What a link led to, as
    in the Hub's cache, stays as it was."""
    text = json.dumps(to_json(contract), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(directory / FILE_NAME, text + "\n")


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of `reward.json`."""
    schema = _schema(RewardContract)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "plaudit reward contract", **schema}


def _check_scale(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ContractError(f"{name} must be a positive finite number, got {value}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(kind: Any, data: Any, path: str) -> Any:
    origin = get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return None if data is None else _read(get_args(kind)[0], data, path)
    if origin is Literal:
        if data not in get_args(kind):
            raise ContractError(f"{path}: expected one of {', '.join(map(repr, get_args(kind)))}, got {data!r}")
        return data
    if origin is tuple:
        _expect(isinstance(data, list), path, "a list", data)
        return tuple(_read(get_args(kind)[0], item, f"{path}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        _expect(isinstance(data, dict), path, "an object", data)
        return {key: _read(get_args(kind)[1], item, f"{path}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _read_object(kind, data, path)
    if kind is float:
        _expect(isinstance(data, (int, float)) and not isinstance(data, bool), path, "a number", data)
        return float(data)
    if kind is int:
        _expect(isinstance(data, int) and not isinstance(data, bool), path, "an integer", data)
    if kind is str:
        _expect(isinstance(data, str), path, "a string", data)
    return data


def _read_object(kind: Any, data: Any, path: str) -> Any:
    _expect(isinstance(data, dict), path, "an object", data)
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(data) - set(hints)):
        raise ContractError(f"{path}: unknown key {unknown[0]!r}; known keys: {', '.join(hints)}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    missing = [n for n, f in fields.items() if n not in data and f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise ContractError(f"{path}: missing key {missing[0]!r}")
    return kind(**{name: _read(hints[name], value, f"{path}.{name}") for name, value in data.items()})


def _expect(condition: bool, path: str, what: str, data: Any) -> None:
    if not condition:
        raise ContractError(f"{path}: expected {what}, got {type(data).__name__}")


def _schema(kind: Any) -> dict[str, Any]:
    origin = get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(get_args(kind)[0]), {"type": "null"}]}
    if origin is Literal:
        return {"enum": list(get_args(kind))}
    if origin is tuple:
        return {"type": "array", "items": _schema(get_args(kind)[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(get_args(kind)[1])}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
        properties = {name: _schema(hint) for name, hint in hints.items()}
        described = {"description": (kind.__doc__ or "").strip()} if kind.__doc__ else {}
        closed = {"properties": properties, "required": required, "additionalProperties": False}
        return {"type": "object", **described, **closed}
    return {str: {"type": "string"}, int: {"type": "integer"}, float: {"type": "number"}}.get(kind, {})
