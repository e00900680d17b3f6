"""The shapes of the answers, as published in OpenAPI. Answers are made in `results` and `routes`; tests hold them
against these."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import ConfigDict, Field, RootModel, with_config
from typing_extensions import TypedDict

from .schema import Transform

_object = with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))


@_object
class ErrorDetail(TypedDict):
    """Why a request failed. `code` is stable; `param` is the path of the field at fault."""

    code: str
    message: str
    type: str
    param: str | None
    retryable: bool
    retry_after_ms: NotRequired[int]
    request_id: str | None


@_object
class ErrorAnswer(TypedDict):
    """The one shape of errors."""

    error: ErrorDetail


@_object
class ItemErrorDetail(TypedDict):
    """Why one item has no score."""

    code: str
    message: str
    type: str
    retryable: bool


@_object
class Truncated(TypedDict):
    """How many tokens were cut, and from where."""

    side: Literal["prompt", "left"]
    tokens: int


@_object
class ItemTiming(TypedDict):
    """Milliseconds in the queue, and of the batch that the item was in."""

    queue_ms: float
    compute_ms: float


@_object
class ItemResult(TypedDict):
    """One candidate's score, or null with an error. `index` counts the flattened request."""

    index: int
    item_index: int
    response_index: int | None
    score: float | None
    tokens: int | None
    truncated: Truncated | None
    cached: bool
    attributes: NotRequired[dict[str, float]]
    timing: NotRequired[ItemTiming]
    error: NotRequired[ItemErrorDetail]


@_object
class Usage(TypedDict):
    """Tokens of the prompts, of all scored items, and how many of these were shared or came from the cache."""

    prompt_tokens: int
    total_tokens: int
    shared_tokens: int
    cached_tokens: int


@_object
class Timing(TypedDict):
    """Milliseconds: of the item that waited longest, of tokenising, and of the slowest batch."""

    queue_ms: float
    tokenize_ms: float
    compute_ms: float


@_object
class Head(TypedDict):
    """Who scored. Equal `revision` and `numerics` mean equal scores."""

    request_id: str
    model: str
    revision: str
    numerics: str
    transform: Transform
    usage: Usage
    timing: Timing


@_object
class ScoreAnswer(Head):
    """`scores` and `results` are as long as the flattened request, and in its order. `score` is there for the
    shape {"prompt", "response"}."""

    score: NotRequired[float]
    scores: list[float | None]
    results: list[ItemResult]


@_object
class RankAnswer(Head):
    """Best first. `best` is the index of the best response; null if none has a score."""

    best: int | None
    results: list[ItemResult]
    failed: list[ItemResult]


Probability = Annotated[float, Field(ge=0, le=1)]


@_object
class CompareAnswer(Head):
    """`probability` that A is the better response: sigmoid(margin / temperature)."""

    probability: Probability
    margin: float
    temperature: float
    scores: Annotated[list[float], Field(min_length=2, max_length=2)]


@_object
class RewardLogs(TypedDict):
    """Numbers a trainer may log: tokens of each text, and 1 where it was cut."""

    tokens: list[int]
    truncated: list[int]


@_object
class RewardAnswer(TypedDict):
    """OpenRLHF's answer; `rewards` and `scores` are the same numbers."""

    rewards: list[float]
    scores: list[float]
    extra_logs: RewardLogs


@_object
class EvaluationAnswer(TypedDict):
    """LLaMA-Factory's answer."""

    id: str
    object: Literal["score.evaluation"]
    model: str
    scores: list[float]


@_object
class TextUsage(TypedDict):
    """Tokens of all texts, twice: other servers know prompts alone."""

    prompt_tokens: int
    total_tokens: int


@_object
class Classification(TypedDict):
    """A raw score, in the place of a probability; the label is the name of the head."""

    index: int
    label: str
    probs: Annotated[list[float], Field(min_length=1, max_length=1)]
    num_classes: Literal[1]


@_object
class ClassifyAnswer(TypedDict):
    """vLLM's answer."""

    id: str
    object: Literal["list"]
    model: str
    data: list[Classification]
    usage: TextUsage


@_object
class Embedding(TypedDict):
    """A raw score, as an embedding of one dimension."""

    object: Literal["embedding"]
    index: int
    embedding: Annotated[list[float], Field(min_length=1, max_length=1)]


@_object
class EmbeddingsAnswer(TypedDict):
    """SGLang's answer."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: TextUsage


@_object
class TextInfo(TypedDict):
    """Of one text: the request's `rid`, or its id here, and the tokens."""

    id: str
    prompt_tokens: int


@_object
class SglangEmbedding(TypedDict):
    """SGLang's own answer for one text: a raw score, as an embedding of one dimension."""

    embedding: Annotated[list[float], Field(min_length=1, max_length=1)]
    meta_info: TextInfo


class ClassificationAnswer(RootModel[ClassifyAnswer | SglangEmbedding | list[SglangEmbedding]]):
    """vLLM's answer, or SGLang's: for one text, or for a list of them."""


@_object
class Pooled(TypedDict):
    """A raw score."""

    object: Literal["pooling"]
    index: int
    data: Annotated[list[float], Field(min_length=1, max_length=1)]


@_object
class PoolingAnswer(TypedDict):
    """vLLM's answer."""

    id: str
    object: Literal["list"]
    model: str
    data: list[Pooled]
    usage: TextUsage


@_object
class Document(TypedDict):
    """A response."""

    text: str


@_object
class Relevance(TypedDict):
    """A response, its place in the request and its raw score."""

    index: int
    document: Document
    relevance_score: float


@_object
class AllTokens(TypedDict):
    """Tokens of the prompt with each response."""

    total_tokens: int


@_object
class RerankAnswer(TypedDict):
    """Best first."""

    id: str
    model: str
    results: list[Relevance]
    usage: AllTokens
