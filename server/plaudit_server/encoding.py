"""Items to token ids, off the event loop. One encoder a thread: a shared one can truncate wrongly, silently."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

from plaudit_model.encode import Encoded, Encoder, Overlong
from plaudit_model.errors import ItemError
from plaudit_model.items import encode_item
from plaudit_model.records import Role

from .rendered import RenderedRule

Items = Sequence[Mapping[str, Any]]

INLINE_BYTES = 2048
"""A request with less text than this is encoded where it stands: a thread's round trip costs more."""

CHUNK_ITEMS = 32
"""Items of one errand to a thread. A request has at most one errand a thread under way, so others get between."""

_ID_BYTES = 4
_ROLES = frozenset(get_args(Role))


class EncodingPool:
    """Encodes for one model. `item_bytes` bounds an item before it is tokenised."""

    def __init__(self, encoder: Encoder, threads: int, rule: RenderedRule, item_bytes: int) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the library's own threads cost a lone text a switch
        self._encoder = encoder
        self._threads = threads
        self._rule = rule
        self._item_bytes = item_bytes
        self._local = threading.local()
        self._executor = ThreadPoolExecutor(threads, "plaudit-encode", initializer=self._equip)

    @functools.cached_property
    def opening(self) -> str:
        """What rendered text of this model begins with: see `Encoder.opening`."""
        return self._encoder.opening()

    def warm(self) -> None:
        """Give every thread its encoder now. Blocks for as long as it takes to read the tokenizer."""
        together = threading.Barrier(self._threads)
        list(self._executor.map(lambda _: together.wait(), range(self._threads)))

    def close(self) -> None:
        """End the threads; what they have not begun is dropped."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def encode(self, items: Items, overlong: Overlong) -> list[Encoded | ItemError]:
        """Token ids of every item, or why it has none; in order."""
        if sum(map(_size, items)) < INLINE_BYTES:
            return self._encode(self._encoder, items, overlong)
        chunks = [items[start : start + CHUNK_ITEMS] for start in range(0, len(items), CHUNK_ITEMS)]
        loop = asyncio.get_running_loop()
        encoded: list[Encoded | ItemError] = []
        for start in range(0, len(chunks), self._threads):
            errands = [
                loop.run_in_executor(self._executor, self._errand, chunk, overlong)
                for chunk in chunks[start : start + self._threads]
            ]
            for part in await asyncio.gather(*errands):
                encoded += part
        return encoded

    def _equip(self) -> None:
        self._local.encoder = self._encoder.clone()

    def _errand(self, items: Items, overlong: Overlong) -> list[Encoded | ItemError]:
        return self._encode(self._local.encoder, items, overlong)

    def _encode(self, encoder: Encoder, items: Items, overlong: Overlong) -> list[Encoded | ItemError]:
        return [self._encode_one(encoder, item, overlong) for item in items]

    def _encode_one(self, encoder: Encoder, item: Mapping[str, Any], overlong: Overlong) -> Encoded | ItemError:
        try:
            self._check(item)
            if "text" in item and (turns := self._rule.conversation(item["text"])) is not None:
                return encoder.encode_conversation(turns, overlong)
            return encode_item(encoder, item, overlong)
        except ItemError as error:
            return error

    def _check(self, item: Mapping[str, Any]) -> None:
        if (size := _size(item)) > self._item_bytes:
            raise ItemError("too_long", f"the item has {size} bytes; an item may have {self._item_bytes}")
        for messages in (item.get("messages", ()), item.get("prompt", ())):
            if not isinstance(messages, str) and any(turn["role"] not in _ROLES for turn in messages):
                raise ItemError("invalid_messages", f"a message's role is one of {', '.join(sorted(_ROLES))}")


def _size(item: Mapping[str, Any]) -> int:
    """Bytes of an item's text and token ids."""
    return sum(map(_bytes, item.values()))


def _bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, int):
        return _ID_BYTES
    if value and isinstance(value[0], int):
        return _ID_BYTES * len(value)
    return sum(_bytes(turn["content"]) for turn in value)
