"""Text -> token ids, and how many of them lie before a boundary: what a tokenizer tells with less work than it offers.

Finding the boundary by the tokenizer's own offsets costs a third of tokenising; the lengths of byte-level tokens give
it for next to nothing. And what precedes the last special token of a prompt has the same ids whatever follows it, so
the responses to one prompt share its tokenising.
"""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import tokenizers

_RULES = ("normalized", "lstrip", "rstrip", "single_word")
"""Of an added token: what makes it depend on the text around it."""

STEMS = 64
"""Prompts whose beginnings are kept: about what a trainer has in flight at once."""

STEM_TOKENS = 1 << 18
"""Tokens of all beginnings together, at the most."""


@dataclass(frozen=True, slots=True)
class Stem:
    """The ids of a text before character `cut`, where a special token begins."""

    cut: int
    ids: list[int]


class BoundedTokenizer:
    """Not thread-safe: one a thread."""

    def __init__(self, tokenizer_json: str) -> None:
        """`tokenizer_json`: the content of a `tokenizer.json`. Its own truncation and padding are not applied."""
        spec = json.loads(tokenizer_json)
        self._json = tokenizer_json
        self._open()
        self._marks = _marks(spec)
        self._bytes = _byte_lengths(self._tokenizer, spec) if _is_byte_level(spec) else []
        self._composed = spec.get("normalizer") is not None
        self.vocabulary = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def _open(self) -> None:
        """An instance of the library's own, and no text seen yet."""
        self._tokenizer = tokenizers.Tokenizer.from_str(self._json)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._stems: OrderedDict[str, Stem] = OrderedDict()
        self._stem_tokens = 0

    def clone(self) -> BoundedTokenizer:
        """The same tokenizer for another thread. What was found out about its tokens is shared."""
        other = copy(self)
        other._open()
        return other

    def id_of(self, token: str) -> int | None:
        """The id of a token; None if there is none."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def ids(self, text: str, *, special_tokens: bool) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer puts around it or without."""
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=special_tokens)[0].ids
        return ids

    def pair(self, first: str, second: str) -> tuple[list[int], int, bool]:
        """The ids of a text pair with its special tokens, how many of them precede the second text, and whether a token
        type marks what follows, as BERT's tokenizer does and RoBERTa's does not."""
        encoding = self._tokenizer.encode_batch_fast([(first, second)])[0]
        ids, types = encoding.ids, encoding.type_ids
        if 1 in types:
            return ids, types.index(1), True
        texts = encoding.sequence_ids
        if 1 in texts:
            return ids, texts.index(1), False
        closed = self._tokenizer.encode_batch_fast([("a", "a")])[0].sequence_ids  # an empty text has but what closes it
        return ids, len(ids) - closed[::-1].index(1), False

    def bounded(self, text: str, boundary: int) -> tuple[list[int], int]:
        """The ids of a text, without special tokens around it, and how many leading ones end at or before character
        `boundary`."""
        head = text[:boundary]
        stem = self._stems.get(head)
        if stem is None:
            ids, count = self._whole(text, boundary)
            self._remember(head, ids[:count])
            return ids, count
        self._stems.move_to_end(head)
        ids, count = self._whole(text[stem.cut :], boundary - stem.cut)
        return stem.ids + ids, len(stem.ids) + count

    def _whole(self, text: str, boundary: int) -> tuple[list[int], int]:
        if self._bytes and (not self._composed or text.isascii() or unicodedata.is_normalized("NFC", text)):
            ids = self.ids(text, special_tokens=False)
            lengths = [self._bytes[token] for token in ids]
            if sum(lengths) == _size(text):  # else an added token has swallowed spaces, or text was dropped
                return ids, _within(lengths, _size(text[:boundary]))
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, _ending_by(encoding, boundary)

    def _remember(self, head: str, ids: list[int]) -> None:
        last = next((i for i in range(len(ids) - 1, 0, -1) if ids[i] in self._marks), 0)
        if not last:
            return
        self._stems[head] = Stem(head.rindex(self._marks[ids[last]]), ids[:last])
        self._stem_tokens += last
        while len(self._stems) > STEMS or self._stem_tokens > STEM_TOKENS:
            self._stem_tokens -= len(self._stems.popitem(last=False)[1].ids)


def _marks(spec: Mapping[str, Any]) -> dict[int, str]:
    """The special tokens, by id, that are found wherever their text stands and whatever stands around it, and nowhere
    else: what a model does not know has a token, too, without its text."""
    added, model = spec.get("added_tokens") or (), spec["model"]
    contents = [token["content"] for token in added]
    together, endings = "\0".join(contents), {text[start:] for text in contents for start in range(len(text))}
    return {
        token["id"]: token["content"]
        for token in added
        if token.get("special") and not any(token.get(rule) for rule in _RULES)
        if token["content"] != model.get("unk_token") and token["id"] != model.get("unk_id")
        if _stands_alone(token["content"], together, endings)
    }


def _stands_alone(mark: str, together: str, endings: Container[str]) -> bool:
    """Whether no token that is found first could take characters of an occurrence of `mark`: none holds it, and none
    ends as it begins."""
    return together.count(mark) == 1 and not any(mark[:length] in endings for length in range(1, len(mark)))


def _is_byte_level(spec: Mapping[str, Any]) -> bool:
    """Whether tokens are the bytes of the text in NFC, each byte a character of the token, and nothing else."""
    before = spec.get("pre_tokenizer") or {}
    steps = [step for step in before.get("pretokenizers", [before]) if step.get("type") == "ByteLevel"]
    bare = bool(steps) and not any(step.get("add_prefix_space", True) for step in steps)
    plain = (spec.get("normalizer") or {"type": "NFC"})["type"] == "NFC"
    return bare and plain and spec["model"].get("type") == "BPE"


def _byte_lengths(tokenizer: tokenizers.Tokenizer, spec: Mapping[str, Any]) -> list[int]:
    """Bytes of each token, by id."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lengths = [0] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        lengths[number] = len(token)
    for token in spec.get("added_tokens") or ():
        lengths[token["id"]] = _size(token["content"])
    return lengths


def _size(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _within(lengths: Sequence[int], boundary: int) -> int:
    """How many leading lengths add up to at most `boundary`."""
    return bisect_right(list(accumulate(lengths)), boundary)


def _ending_by(encoding: tokenizers.Encoding, boundary: int) -> int:
    """How many leading tokens end at or before character `boundary`. The first token that ends after it is the first
    that holds it, which the tokenizer finds without handing out every offset; unless no token holds it."""
    token = encoding.char_to_token(boundary)
    if token is not None:
        return int(token)
    return next((index for index, (_, end) in enumerate(encoding.offsets) if end > boundary), len(encoding.ids))
