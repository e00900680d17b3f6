"""Items to token ids on several threads: in order, item by item, and the same as on one."""

import asyncio
import random

import pytest

from plaudit_model.encode import Encoder
from plaudit_model.errors import ItemError
from plaudit_model.items import encode_item
from plaudit_server.encoding import CHUNK_ITEMS, INLINE_BYTES, EncodingPool
from plaudit_server.rendered import RenderedRule

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def encoder(tiny_model_dir):
    return Encoder.open(tiny_model_dir)


@pytest.fixture
def pool(encoder):
    pool = EncodingPool(encoder, 3, RenderedRule("rerender", encoder.contract.template.source), item_bytes=50_000)
    pool.warm()
    yield pool
    pool.close()


def encode(pool, items, overlong="error"):
    return asyncio.run(pool.encode(items, overlong))


def test_many_items_come_back_in_order_as_one_encoder_gives_them(encoder, pool):
    draw = random.Random(7)
    items = [{"prompt": f"question {i}", "response": "word " * draw.randrange(90)} for i in range(5 * CHUNK_ITEMS + 3)]
    for item, encoded in zip(items, encode(pool, items), strict=True):
        expected = encode_item(encoder, item)
        assert encoded.ids.tolist() == expected.ids.tolist() and encoded.prompt_tokens == expected.prompt_tokens


def test_requests_at_once_with_different_rules_do_not_disturb_each_other(encoder, pool):
    """A shared tokenizer truncates wrongly under exactly this load, without an error."""
    text = "a long story " * 400
    items = [{"text": text[: 100 * (i % 50 + 1)]} for i in range(100)]

    async def both():
        rules = ["truncate_left", "error"] * 4
        return rules, await asyncio.gather(*(pool.encode(items, rule) for rule in rules))

    for rule, answers in zip(*asyncio.run(both()), strict=True):
        assert [outcome(encoded) for encoded in answers] == [outcome(one_by_one(encoder, item, rule)) for item in items]


def one_by_one(encoder, item, rule):
    try:
        return encode_item(encoder, item, rule)
    except ItemError as error:
        return error


def outcome(encoded):
    return encoded.code if isinstance(encoded, ItemError) else encoded.ids.tolist()


@pytest.mark.parametrize("neighbours", [1, INLINE_BYTES // 100])
@pytest.mark.parametrize(
    ("item", "code"),
    [
        ({"prompt": "p", "response": "\ud800"}, "invalid_unicode"),
        ({"prompt": "p" * 50_001, "response": "r"}, "too_long"),
        ({"prompt": "\u2603" * 17_000, "response": "r"}, "too_long"),
        ({"input_ids": [1] * 12_501}, "too_long"),
        ({"prompt": "p " * 3_000, "response": "r"}, "too_long"),
        ({"prompt": [], "response": "r"}, "invalid_messages"),
        ({"messages": []}, "invalid_messages"),
        ({"messages": [USER]}, "invalid_messages"),
        ({"messages": [USER, {"role": "narrator", "content": "x"}]}, "invalid_messages"),
        ({"prompt": [{"role": "\ud800", "content": "x"}], "response": "r"}, "invalid_messages"),
        ({"input_ids": [10**30]}, "invalid_token_ids"),
        ({"input_ids": [1], "prompt_tokens": 2}, "invalid_token_ids"),
        ({"input_ids": []}, "empty_input"),
        ({"text": ""}, "empty_input"),
        ({"text": "<start_of_turn>user\nhi"}, "rendered_text_refused"),
    ],
)
def test_a_bad_item_fails_alone_and_says_nothing_of_what_it_was(pool, item, code, neighbours):
    good = [{"prompt": "p" * 100, "response": "r"}] * neighbours
    *before, bad, last = encode(pool, [*good, item, *good[:1]])
    assert bad.code == code and "narrator" not in bad.message
    assert all(len(encoded.ids) for encoded in (*before, last))


def test_nul_and_an_empty_response_are_text_like_any_other(encoder, pool):
    nul, without, empty = encode(pool, [{"prompt": "p", "response": response} for response in ("a\x00b", "ab", "")])
    assert len(nul.ids) == len(without.ids) + 1 and len(empty.ids) > 0


def test_foreign_text_is_rendered_again_with_the_models_own_template(encoder, pool):
    foreign = "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nhello<end_of_turn>\n"
    (encoded,) = encode(pool, [{"text": foreign}])
    assert encoded.ids.tolist() == encoder.encode("hi", "hello").ids.tolist()
