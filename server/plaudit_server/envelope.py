"""From the bytes of a body to a checked `Call`. A bad envelope is a RequestError; bad items come later.

Bodies are decoded once and strictly. JSON allows a lone surrogate as an escape and strict decoders refuse the
whole body for it; such a body is decoded again leniently, so that only the item that holds it fails. Of
duplicate keys the last one counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from plaudit_model.encode import Overlong

from . import schema
from .domain import Priority
from .errors import RequestError
from .schema import Include, Transform
from .settings import MAX_ITEMS

SHAPES = (
    '{"prompt", "response"}, {"prompt", "responses": [..]}, {"messages": [..]}, or {"items": [..]} with items of '
    'those shapes, {"text"}, or {"input_ids", "prompt_tokens"?}'
)
_BESIDE = '; beside them "model" (id or id@revision), "overlong", "priority", "deadline_ms"'
_SCORED = _BESIDE + ', "transform", "include"'
_SCORE = TypeAdapter[Any](schema.ScoreRequest)
_RANK = TypeAdapter[Any](schema.RankRequest)
_COMPARE = TypeAdapter[Any](schema.CompareRequest)
_REWARD = TypeAdapter[Any](schema.RewardRequest)
_EVALUATION = TypeAdapter[Any](schema.EvaluationRequest)
_CLASSIFY = TypeAdapter[Any](schema.ClassificationRequest)
_POOLING = TypeAdapter[Any](schema.PoolingRequest)
_RERANK = TypeAdapter[Any](schema.RerankRequest)
_EMBEDDINGS = TypeAdapter[Any](schema.EmbeddingsRequest)
_QUERY = TypeAdapter[Any](schema.QueryOptions)
_VLLM = '{"model", "input": text or texts, "use_activation": false} or {"model", "messages", "use_activation": false}'
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One response to be scored: a flattened item, and where in the request it stood. `response_index` counts
    the item's `responses`; None if it has none."""

    item: Mapping[str, Any]
    item_index: int
    response_index: int | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What a request asked for. None leaves the choice to the route."""

    model: str | None = None
    overlong: Overlong | None = None
    priority: Priority | None = None
    deadline_ms: float | None = None
    transform: Transform = "none"
    include: Sequence[Include] = ()

    def over(self, url: Options) -> Options:
        """These options, with the URL's where there are none."""
        if self.model is not None and url.model is not None and self.model != url.model:
            raise RequestError("ambiguous_model", "the URL and the body name different models", param="model")
        return replace(
            self,
            model=self.model or url.model,
            overlong=self.overlong or url.overlong,
            priority=self.priority or url.priority,
            deadline_ms=self.deadline_ms or url.deadline_ms,
        )


NO_OPTIONS = Options()


@dataclass(frozen=True, slots=True)
class Call:
    """A checked request. `single`: one response, and no list of one, as in {"prompt", "response"}.

    Of compatibility routes: `field` holds the responses, `bare` texts lack what a template begins with, and the answer
    goes by the name of `rid`.
    """

    candidates: Sequence[Candidate]
    options: Options = NO_OPTIONS
    single: bool = False
    top_n: int | None = None
    field: str = ""
    bare: bool = False
    rid: str | None = None


def read_score(body: bytes) -> Call:
    """`POST /score`. Raises RequestError."""
    request = _checked(_SCORE, body, SHAPES + _SCORED)
    items = request["items"] if "items" in request else [_without_options(request)]
    candidates = [candidate for index, item in enumerate(items) for candidate in _flatten(item, index)]
    if len(candidates) > MAX_ITEMS:
        _too_many("items")
    return Call(candidates, _options(request), single="response" in request)


def read_rank(body: bytes) -> Call:
    """`POST /rank`. Raises RequestError."""
    request = _checked(_RANK, body, '{"prompt", "responses": [..], "top_n"?}' + _SCORED)
    item = {"prompt": request["prompt"], "responses": request["responses"]}
    return Call(list(_flatten(item, 0)), _options(request), top_n=request.get("top_n"))


def read_compare(body: bytes) -> Call:
    """`POST /compare`: two candidates. Raises RequestError."""
    request = _checked(_COMPARE, body, '{"prompt", "response_a", "response_b"}' + _BESIDE)
    item = {"prompt": request["prompt"], "responses": [request["response_a"], request["response_b"]]}
    return Call(list(_flatten(item, 0)), _options(request))


def read_reward(body: bytes) -> Call:
    """OpenRLHF's `POST /get_reward`. Raises RequestError."""
    return _listed(_checked(_REWARD, body, '{"query": [..]}'), "query")


def read_evaluation(body: bytes) -> Call:
    """LLaMA-Factory's `POST /v1/score/evaluation`. Raises RequestError."""
    request = _checked(_EVALUATION, body, '{"model", "messages": [..], "max_length"?} with rendered texts')
    if request.get("max_length") is not None:
        raise RequestError("invalid_request", "the model's own length counts; leave max_length out", param="max_length")
    return _listed(request, "messages")


def read_classify(body: bytes) -> Call:
    """`POST /classify`, vLLM's or SGLang's. Raises RequestError."""
    return _named(_checked(_CLASSIFY, body, _VLLM + ', or {"model", "text"} or {"model", "input_ids"}, "rid"?'))


def read_pooling(body: bytes) -> Call:
    """vLLM's `POST /pooling`. Raises RequestError."""
    return _named(_checked(_POOLING, body, _VLLM))


def read_embeddings(body: bytes) -> Call:
    """SGLang's `POST /v1/embeddings`. Raises RequestError."""
    return _named(_checked(_EMBEDDINGS, body, '{"model", "input"}'))


def read_rerank(body: bytes) -> Call:
    """`POST /rerank`. Raises RequestError."""
    request = _checked(_RERANK, body, '{"model", "query", "documents": [..], "top_n"?}')
    pairs = ({"prompt": request["query"], "response": document} for document in request["documents"])
    candidates = [Candidate(pair, 0, index) for index, pair in enumerate(pairs)]
    return Call(candidates, Options(model=_id(request)), top_n=request.get("top_n") or None, field="documents")


def read_query(pairs: Sequence[tuple[str, str]]) -> Options:
    """Options in the URL. Raises RequestError for one that is not known, or is given twice."""
    if not pairs:
        return NO_OPTIONS
    values = dict(pairs)
    if len(values) != len(pairs):
        raise RequestError("invalid_request", "an option stands in the URL twice")
    try:
        return Options(**_QUERY.validate_python(values))
    except ValidationError as error:
        raise _explained(error, "?overlong=, ?priority= and ?deadline_ms=") from None


def decode(body: bytes) -> Any:
    """The value of a JSON body. Raises RequestError; `NaN`, `Infinity` and 200 levels are no JSON here."""
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        if not _SURROGATE_ESCAPE.search(body):
            raise RequestError("invalid_json", f"the body is not JSON: {error}") from None
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError:
        raise RequestError("invalid_json", "the body is not JSON: recursion limit exceeded") from None
    except ValueError as error:
        place = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise RequestError("invalid_json", f"the body is not JSON{place}") from None


def _no_constant(_name: str) -> NoReturn:
    raise ValueError("not a JSON number")


def _checked(adapter: TypeAdapter[Any], body: bytes, shapes: str) -> dict[str, Any]:
    value = decode(body)
    if isinstance(value, dict) and len(value) > schema.MOST_FIELDS:
        raise RequestError("unknown_field", f"the request has more fields than are known here: {shapes}")
    try:
        request: dict[str, Any] = adapter.validator.validate_python(value)
    except ValidationError as error:
        raise _explained(error, shapes) from None
    return request


def _named(request: Mapping[str, Any]) -> Call:
    """The texts, the ids or the conversation of a request that may name its model."""
    field = next(name for name in ("messages", "text", "input_ids", "input") if name in request)
    if field == "messages":
        call = Call([Candidate({"messages": request["messages"]}, 0)], field=field)
    else:
        call = _listed(request, field, "input_ids" if field == "input_ids" else "text")
    bare = field in ("text", "input") and request.get("add_special_tokens", True)
    return replace(call, options=Options(model=_id(request)), bare=bare, rid=request.get("rid"))


def _listed(request: Mapping[str, Any], field: str, shape: str = "text") -> Call:
    given = request[field]
    single = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    items = [{shape: value} for value in ([given] if single else given)]
    return Call([Candidate(item, index) for index, item in enumerate(items)], single=single, field=field)


def _id(request: Mapping[str, Any]) -> str | None:
    """Of a model that is named by its path, the last part is its id, as in `plaudit serve PATH`."""
    return request.get("model", "").rstrip("/").rsplit("/", 1)[-1] or None


def _without_options(request: Mapping[str, Any]) -> Mapping[str, Any]:
    if request.keys() <= schema.SHAPE_FIELDS:
        return request
    return {key: value for key, value in request.items() if key in schema.SHAPE_FIELDS}


def _options(request: Mapping[str, Any]) -> Options:
    if request.keys() <= schema.SHAPE_FIELDS:
        return NO_OPTIONS
    return Options(**{key: value for key, value in request.items() if key in Options.__slots__})


def _flatten(item: Mapping[str, Any], index: int) -> Sequence[Candidate]:
    if "responses" not in item:
        return [Candidate(item, index)]
    prompt = item["prompt"]
    return [
        Candidate({"prompt": prompt, "response": response}, index, number)
        for number, response in enumerate(item["responses"])
    ]


def _explained(error: ValidationError, shapes: str) -> RequestError:
    """The first fault, in words that hold nothing of what was sent."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    first = _most_telling(details)
    path = _path(first)
    if first["type"] == "too_long":
        _too_many(path)
    code, message = _fault(first, path, shapes)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return RequestError(code, f"{path or 'the request'} {message}{more}", param=path or None)


def _most_telling(details: list[ErrorDetails]) -> ErrorDetails:
    """The first fault; of a list of messages the fault inside it, rather than that it is no text."""
    inside = _path(details[0]) + "["
    return next((detail for detail in details if _path(detail).startswith(inside)), details[0])


def _fault(detail: ErrorDetails, path: str, shapes: str) -> tuple[str, str]:
    kind = detail["type"]
    if kind.startswith("union_tag"):
        return "invalid_shape", f"has none of the shapes that are known here: {shapes}"
    if kind == "extra_forbidden" or (kind == "string_unicode" and not path.endswith("rid")):
        return "unknown_field", f"has a field that is not known here: {shapes}"
    if path.endswith("prompt") and kind in ("is_instance_of", "list_type"):
        return "invalid_request", 'must be text or a list of {"role", "content"} messages'
    if kind in ("is_instance_of", "string_unicode"):
        return "invalid_request", "must be text"
    if kind == "missing":
        return "invalid_request", f"is missing; known here: {shapes}"
    return "invalid_request", "is not valid: " + detail["msg"][0].lower() + detail["msg"][1:]


def _path(detail: ErrorDetails) -> str:
    """`items[3].response`: the fields of our own schema only, so that nothing of the client's is repeated."""
    steps = detail["loc"][:-1] if detail["type"] == "extra_forbidden" else detail["loc"]
    path = ""
    for step in steps:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step in _FIELDS:
            path += f".{step}" if path else step
    return path


def _too_many(param: str) -> NoReturn:
    raise RequestError("too_many_items", f"a request takes at most {MAX_ITEMS} items; send several", param=param)


_FIELDS = schema.SHAPE_FIELDS | {
    "role", "content", "query", "response_a", "response_b", "top_n", "input", "max_length", "use_activation", "label",
    "documents", "raw_scores", "return_documents", "rid", "add_special_tokens",
    *Options.__slots__,
}  # fmt: skip
