"""The wire's shapes as published in OpenAPI, and what requests are checked against. `envelope` reads them.

Objects are plain dicts once checked, so an item goes on to `plaudit_model.items` as it came. Everything is
strict, an unknown field is an error, and a number is finite. A list (but that of items) ends with its first fault, and
an object has at most `MOST_FIELDS`: each fault that is collected takes a kilobyte, and a body has room for millions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, GetCoreSchemaHandler, Tag, with_config
from pydantic_core import core_schema
from typing_extensions import TypedDict

from plaudit_model.encode import Overlong

from .domain import Priority
from .settings import MAX_ITEMS

Transform = Literal["none", "normalized", "probability"]
Include = Literal["attributes", "timing"]

MOST_FIELDS = 100

_object = with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
_lenient = with_config(ConfigDict(extra="ignore", strict=True, allow_inf_nan=False))


class _AnyUnicode:
    """Text that may hold a lone surrogate: the item that holds it fails when it is encoded, its neighbours do not."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.json_or_python_schema(core_schema.str_schema(), core_schema.is_instance_schema(str))


Text = Annotated[str, _AnyUnicode]


@_object
class Message(TypedDict):
    """One turn of a conversation: the role is `system`, `user`, `assistant` or `tool`."""

    role: Text
    content: Text


def _bounded(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MOST_FIELDS:
        raise ValueError("a message has a role and a content")
    return value


Messages = Annotated[list[Annotated[Message, BeforeValidator(_bounded)]], Field(fail_fast=True)]

Prompt = Text | Messages
"""Text is one user message."""

Responses = Annotated[list[Text], Field(max_length=MAX_ITEMS, fail_fast=True)]


Ids = Annotated[list[int], Field(fail_fast=True)]


@_object
class PromptResponse(TypedDict):
    """One response to a prompt."""

    prompt: Prompt
    response: Text


@_object
class PromptResponses(TypedDict):
    """Several responses to one prompt: flattened in order, and the prompt is computed once."""

    prompt: Prompt
    responses: Responses


@_object
class Conversation(TypedDict):
    """A conversation that ends with the assistant's turn, which is what is scored."""

    messages: Messages


@_object
class RenderedText(TypedDict):
    """A conversation that a chat template has already rendered."""

    text: Text


@_object
class TokenIds(TypedDict):
    """Token ids of the served model's tokenizer; the first `prompt_tokens` are the prompt's."""

    input_ids: Ids
    prompt_tokens: NotRequired[Annotated[int, Field(ge=0)]]


def _shape(value: Any) -> str | None:
    """Which shape an object has, by the fields that shapes have; fields beyond those are found out later."""
    if not isinstance(value, dict) or len(value) > MOST_FIELDS:
        return None
    return TAGS.get(frozenset(value) & SHAPE_FIELDS)


TAGS = {
    frozenset({"prompt", "response"}): "<prompt_response>",
    frozenset({"prompt", "responses"}): "<prompt_responses>",
    frozenset({"messages"}): "<messages>",
    frozenset({"text"}): "<text>",
    frozenset({"input_ids"}): "<input_ids>",
    frozenset({"input_ids", "prompt_tokens"}): "<input_ids>",
    frozenset({"items"}): "<items>",
}
SHAPE_FIELDS = frozenset[str]().union(*TAGS)

Item = Annotated[
    Annotated[PromptResponse, Tag("<prompt_response>")]
    | Annotated[PromptResponses, Tag("<prompt_responses>")]
    | Annotated[Conversation, Tag("<messages>")]
    | Annotated[RenderedText, Tag("<text>")]
    | Annotated[TokenIds, Tag("<input_ids>")],
    Discriminator(_shape),
]


@_object
class SharedOptions(TypedDict, total=False):
    """Options of every native route. They win over the same options in the URL."""

    model: Annotated[Text, Field(description="id, alias, or id@revision; needed where several models are served")]
    overlong: Annotated[Overlong, Field(description="what becomes of an item that is too long; default `error`")]
    priority: Annotated[Priority, Field(description="default `interactive`; `batch` waits through a restart")]
    deadline_ms: Annotated[float, Field(gt=0, le=86_400_000, description="relative, in milliseconds")]


@_object
class Options(SharedOptions, total=False):
    """Options of the routes that give scores."""

    transform: Annotated[Transform, Field(description="normalized: (score - mean) / std; probability: "
                                                      "sigmoid((score - mean) / temperature)")]  # fmt: skip
    include: Annotated[list[Include], Field(fail_fast=True, description="what else each result should hold")]


@_object
class ScorePromptResponse(PromptResponse, Options):
    """One response: the answer also has a top-level `score`. slime sends a `label` beside it, which is not read."""

    label: NotRequired[Any]


@_object
class ScorePromptResponses(PromptResponses, Options):
    """Several responses to one prompt."""


@_object
class ScoreConversation(Conversation, Options):
    """One conversation."""


@_object
class ScoreItems(Options):
    """Items of any shape, in any mixture."""

    items: Annotated[list[Item], Field(max_length=MAX_ITEMS)]


ScoreRequest = Annotated[
    Annotated[ScorePromptResponse, Tag("<prompt_response>")]
    | Annotated[ScorePromptResponses, Tag("<prompt_responses>")]
    | Annotated[ScoreConversation, Tag("<messages>")]
    | Annotated[ScoreItems, Tag("<items>")],
    Discriminator(_shape),
]


@_object
class RankRequest(PromptResponses, Options):
    """Responses to be sorted, best first."""

    top_n: NotRequired[Annotated[int, Field(ge=1)]]


@_object
class CompareRequest(SharedOptions):
    """Two responses to one prompt."""

    prompt: Prompt
    response_a: Text
    response_b: Text


@_lenient
class RewardRequest(TypedDict):
    """OpenRLHF's request. Whatever else its forks send beside `query` is ignored."""

    query: Responses
    prompts: NotRequired[Any]
    labels: NotRequired[Any]


@_object
class EvaluationRequest(TypedDict):
    """LLaMA-Factory's request: rendered texts. `model` is not read; a `max_length` is refused."""

    messages: Responses
    model: NotRequired[Text]
    max_length: NotRequired[int | None]


@_object
class EmbeddingsRequest(TypedDict):
    """SGLang's request as verl sends it: one rendered text, or several. `model` is an id, or a path that ends so."""

    input: Text | Responses
    model: NotRequired[Text]


@_object
class ClassifyRequest(EmbeddingsRequest):
    """vLLM's request. Scores are raw here, which vLLM has to be asked for, in its older versions by `activation` or
    `softmax`. Without `add_special_tokens` the text is taken to begin without its first token, as by vLLM."""

    use_activation: Literal[False]
    add_special_tokens: NotRequired[bool]


@_object
class ClassifyConversation(TypedDict):
    """vLLM's request for one conversation, which the model's own template renders."""

    messages: Messages
    use_activation: Literal[False]
    model: NotRequired[Text]


Rid = Annotated[str, Field(max_length=256)]
"""It stands in the answer once for each text."""


@_object
class SglangTexts(TypedDict):
    """SGLang's own request: a rendered text, or several; `rid` is the id in the answer."""

    text: Text | Responses
    model: NotRequired[Text]
    rid: NotRequired[Rid]


@_object
class SglangIds(TypedDict):
    """SGLang's own request: the ids of a text, or of several."""

    input_ids: Ids | Annotated[list[Ids], Field(max_length=MAX_ITEMS, fail_fast=True)]
    model: NotRequired[Text]
    rid: NotRequired[Rid]


@_object
class RerankRequest(TypedDict):
    """The request of vLLM and others: the prompt is the query, the responses are the documents. `top_n` 0 is all. The
    documents are returned always, as by vLLM, and the scores are raw: infinity has to be asked for such."""

    query: Text
    documents: Responses
    return_documents: NotRequired[bool]
    raw_scores: NotRequired[Literal[True]]
    top_n: NotRequired[Annotated[int, Field(ge=0)]]
    model: NotRequired[Text]


def _newer(value: Any) -> Any:
    """`use_activation` by the name that vLLM reads now, where no other stands beside it."""
    names = {"use_activation", "activation", "softmax"} & value.keys() if isinstance(value, dict) else ()
    return {"use_activation" if key in names else key: value[key] for key in value} if len(names) == 1 else value


def _raw(value: Any) -> Any:
    return {"use_activation": False, **_newer(value)} if isinstance(value, dict) else value


def _given(value: Any) -> str:
    known = ("messages", "text", "input_ids")
    return next((f"<{name}>" for name in known if isinstance(value, dict) and name in value), "<input>")


_Input = Annotated[ClassifyRequest, Tag("<input>")]
_Turns = Annotated[ClassifyConversation, Tag("<messages>")]
_Texts = Annotated[SglangTexts, Tag("<text>")] | Annotated[SglangIds, Tag("<input_ids>")]

PoolingRequest = Annotated[Annotated[_Input | _Turns, Discriminator(_given)], BeforeValidator(_raw)]
ClassificationRequest = Annotated[Annotated[_Input | _Turns | _Texts, Discriminator(_given)], BeforeValidator(_newer)]


class QueryOptions(TypedDict, total=False):
    """Options that every scoring route takes in its URL."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]  # not strict: a URL holds text

    overlong: Overlong
    priority: Priority
    deadline_ms: Annotated[float, Field(gt=0, le=86_400_000, allow_inf_nan=False)]
