"""Items as they travel in JSON: the native shapes of the wire contract, read without a web framework.

{"prompt", "response"}    {"prompt", "responses"}    {"messages"}    {"text"}    {"input_ids", "prompt_tokens"?}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from plaudit._items import check
from plaudit.errors import InvalidInput

from .encode import Encoded, Encoder, Overlong
from .errors import ItemError
from .records import Conversation, Message


def flatten(item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One item a response, in order. Raises ItemError for what is none of the native shapes."""
    try:
        check(item)
    except InvalidInput as error:
        raise ItemError("invalid_messages", f"the item {error}") from None
    if "responses" not in item:
        yield dict(item)
        return
    for response in item["responses"]:
        yield {"prompt": item["prompt"], "response": response}


def encode_item(encoder: Encoder, item: Mapping[str, Any], overlong: Overlong = "error") -> Encoded:
    """Token ids of one flattened item. Raises ItemError."""
    if "text" in item:
        return encoder.encode_text(item["text"], overlong)
    if "input_ids" in item:
        return encoder.encode_ids(item["input_ids"], item.get("prompt_tokens", 0), overlong)
    prompt, response = conversation(item)
    return encoder.encode(prompt, response, overlong)


def conversation(item: Mapping[str, Any]) -> Conversation:
    """Prompt and response of a flattened item that has text. Raises ItemError."""
    if "messages" in item:
        turns = messages(item["messages"])
        if len(turns) < 2 or turns[-1].role != "assistant":
            raise ItemError("invalid_messages", "a conversation needs a prompt and must end with the assistant's turn")
        return turns[:-1], turns[-1].content
    if "response" not in item:
        raise ItemError("invalid_messages", "this item has no conversation")
    prompt = item["prompt"]
    turns = (Message("user", prompt),) if isinstance(prompt, str) else messages(prompt)
    return turns, item["response"]


def messages(value: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Messages from {"role", "content"}. Raises ItemError for a role that is none."""
    try:
        return tuple(Message(turn["role"], turn["content"]) for turn in value)
    except ValueError as error:
        raise ItemError("invalid_messages", str(error)) from error
