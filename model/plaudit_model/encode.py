"""Conversation -> token ids with the boundary between prompt and response.

Training and serving both go through here and nowhere else, so a model is served the ids it was trained on.
Imports no torch and no transformers: the tokenizer is the raw `tokenizers.Tokenizer` (`tokens`), without truncation or
padding state. One `Encoder` per thread: a shared one can truncate wrongly without an error (`clone`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import contract as contracts
from .contract import RewardContract
from .errors import CheckpointError, ItemError
from .infer import TOKENIZER_FILE, has_token_types, tokenizer_home
from .records import Message
from .template import ChatTemplate
from .tokens import BoundedTokenizer

Overlong = Literal["error", "truncate_prompt", "truncate_left"]

CONFIG_FILE = "tokenizer_config.json"

_ANSWER = "\ue000"
"""Stands for an answer: of private use, so no template writes it, as it may the word (`</answer>`)."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """How many tokens were cut, and from where: the `prompt`, or the `left` of the whole sequence."""

    side: Literal["prompt", "left"]
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Token ids (L,) int32 of one item; the first `prompt_tokens` are the prompt's. A token whose characters
    lie on both sides of the boundary belongs to the response. Models with token types read 1 from the boundary on,
    unless it is 0."""

    ids: NDArray[np.int32]
    prompt_tokens: int
    truncated: Truncation | None = None


class Encoder:
    """Encodes items as the contract says. Not thread-safe."""

    def __init__(
        self, tokenizer_json: str, special_tokens: Mapping[str, str], contract: RewardContract, *, typed: bool = True
    ) -> None:
        """`typed`: whether the model may have token types. Where it may, and the tokenizer gives all tokens of a pair
        the same, `prompt_tokens` is 0."""
        self.contract = contract
        self._typed = typed
        self._special_tokens = dict(special_tokens)
        self._tokenizer = BoundedTokenizer(tokenizer_json)
        self._template = ChatTemplate(contract.template, special_tokens)
        self._lead = self._leading_ids()
        self._example = self._rendered_example()
        closing = self._example.rpartition(_ANSWER)[2]  # what the template writes behind an answer
        self._end = closing.rstrip()
        self._behind_end = closing.removeprefix(self._end)

    @classmethod
    def open(cls, directory: Path, contract: RewardContract | None = None) -> Encoder:
        """The encoder of a checkpoint directory; the contract is read from it unless given.

        Raises CheckpointError if there is no `tokenizer.json`, or a part of one, ContractError if the contract is
        invalid.
        """
        contract = contract or contracts.read(directory)
        home = tokenizer_home(directory)
        path = home / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(f"{home} has no {TOKENIZER_FILE}; only fast tokenizers are read")
        typed = contract.template.kind == "chat" or has_token_types(directory)
        try:
            return cls(path.read_text(encoding="utf-8"), special_tokens(home), contract, typed=typed)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"the tokenizer of {home} is damaged: {error}") from error

    def clone(self) -> Encoder:
        """The same encoder with its own tokenizer instance, for another thread."""
        other = copy(self)
        other._tokenizer = self._tokenizer.clone()
        return other

    @property
    def vocabulary(self) -> int:
        """One more than the highest token id: where ids were left out, more than there are tokens."""
        return self._tokenizer.vocabulary

    def opening(self) -> str:
        """The BOS that the template writes in front of a conversation, as text; empty if it writes none."""
        bos = self._special_tokens.get("bos_token", "")
        return bos if self._example.startswith(bos) else ""

    def _rendered_example(self) -> str:
        """A question and its answer as the template writes them; empty where it refuses to, or writes none."""
        if self.contract.template.kind == "pair":
            return ""
        try:
            turns = [Message("user", "question"), Message("assistant", _ANSWER)]
            return self._template.render(turns, add_generation_prompt=False)
        except ItemError:
            return ""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._tokenizer.decode(ids)

    def encode(self, prompt: str | Sequence[Message], response: str, overlong: Overlong = "error") -> Encoded:
        """A prompt (text is one user message) and the assistant's response. Raises ItemError."""
        messages = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
        if not messages:
            raise ItemError("invalid_messages", "the prompt has no messages")
        if self.contract.template.kind == "pair":
            return self._pair(messages, response, overlong)
        return self._fit(*self._chat(messages, response), overlong)

    def encode_conversation(self, messages: Sequence[Message], overlong: Overlong = "error") -> Encoded:
        """A conversation that ends with the assistant's turn, which is what is scored. Raises ItemError."""
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise ItemError("invalid_messages", "a conversation needs a prompt and must end with the assistant's turn")
        return self.encode(messages[:-1], messages[-1].content, overlong)

    def encode_text(self, text: str, overlong: Overlong = "error") -> Encoded:
        """Text that is already rendered: no template, no special tokens besides the contract's BOS rule. Where it ends
        with the end of the template's turn, it gets the white space that the template writes behind that: a policy
        stops before it, and it is where the head learnt to read."""
        if self._end and text.endswith(self._end):
            text += self._behind_end
        if self.contract.template.kind == "pair":
            ids = self._tokenizer.ids(_checked(text), special_tokens=True)
        else:
            ids = self._with_bos(self._tokenizer.ids(_checked(text), special_tokens=False))
        return self._fit(ids + list(self.contract.tokens.suffix), 0, overlong)

    def encode_ids(self, ids: Sequence[int], prompt_tokens: int = 0, overlong: Overlong = "error") -> Encoded:
        """Token ids as they are."""
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise ItemError("invalid_token_ids", f"token ids must lie in 0..{self.vocabulary - 1}")
        if not 0 <= prompt_tokens <= len(ids):
            raise ItemError("invalid_token_ids", f"prompt_tokens must lie in 0..{len(ids)}, got {prompt_tokens}")
        return self._fit(list(ids), prompt_tokens, overlong)

    def _chat(self, messages: list[Message], response: str) -> tuple[list[int], int]:
        before = _checked(self._template.render(messages, add_generation_prompt=True))
        messages = [*messages, Message("assistant", response)]
        whole = _checked(self._template.render(messages, add_generation_prompt=False))
        boundary = _common_prefix(before, whole)
        bare, prompt_tokens = self._tokenizer.bounded(whole, boundary)
        ids = self._with_bos(bare)
        return ids + list(self.contract.tokens.suffix), prompt_tokens + len(ids) - len(bare)

    def _pair(self, messages: list[Message], response: str, overlong: Overlong) -> Encoded:
        prompt = _checked(self._template.render(messages, add_generation_prompt=False))
        ids, prompt_tokens, marked = self._tokenizer.pair(prompt, _checked(response))
        encoded = self._fit(ids + list(self.contract.tokens.suffix), prompt_tokens, overlong)
        return encoded if marked or not self._typed else replace(encoded, prompt_tokens=0)

    def _with_bos(self, ids: list[int]) -> list[int]:
        """BOS in front if the contract adds one; never twice."""
        if self.contract.tokens.bos == "template" or not self._lead or ids[: len(self._lead)] == self._lead:
            return ids
        return self._lead + ids

    def _leading_ids(self) -> list[int]:
        """The BOS or CLS token, kept at the front when the prompt is cut."""
        for name in ("bos_token", "cls_token"):
            token = self._tokenizer.id_of(self._special_tokens.get(name, ""))
            if token is not None:
                return [token]
        return []

    def _fit(self, ids: list[int], prompt_tokens: int, overlong: Overlong) -> Encoded:
        """Apply the length rule: the response and the suffix that the head reads are never cut from the right."""
        if not ids:
            raise ItemError("empty_input", "the item gives no tokens")
        excess = len(ids) - self.contract.max_length
        if excess <= 0:
            return Encoded(np.fromiter(ids, np.int32, len(ids)), prompt_tokens)
        if overlong == "error":
            rule = "truncate_prompt" if prompt_tokens else "truncate_left"
            raise self._too_long(len(ids), f"send overlong={rule}, or a shorter item")
        lead = len(self._lead) if ids[: len(self._lead)] == self._lead else 0
        if overlong == "truncate_left":
            kept = ids[:lead] + ids[lead + excess :]
            return Encoded(np.array(kept, dtype=np.int32), max(prompt_tokens - excess, 0), Truncation("left", excess))
        if prompt_tokens - lead <= excess:
            raise self._too_long(len(ids), "the response alone exceeds it; cutting the prompt cannot help")
        kept = ids[:lead] + ids[lead + excess :]
        return Encoded(np.array(kept, dtype=np.int32), prompt_tokens - excess, Truncation("prompt", excess))

    def _too_long(self, tokens: int, advice: str) -> ItemError:
        return ItemError("too_long", f"{tokens} tokens, the limit is {self.contract.max_length}: {advice}")


def special_tokens(directory: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... of a tokenizer directory, as template variables."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", CONFIG_FILE):
        path = directory / name
        if path.is_file():
            for key, value in json.loads(path.read_text(encoding="utf-8")).items():
                if key.endswith("_token") and (text := _token_text(value)):
                    found[key] = text
    return found


def _token_text(value: Any) -> str:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _checked(text: str) -> str:
    """The text, if it can be UTF-8. NUL is text like any other; a lone surrogate is not text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ItemError("invalid_unicode", "the text has a lone surrogate: it is not Unicode text") from error
    return text


def _common_prefix(a: str, b: str) -> int:
    """Length in characters of what two renderings begin with. Usually `a` itself: templates that close the
    prompt differently without a response (an empty think block, say) share less."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
