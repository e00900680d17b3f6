"""The tokenizer loses nothing, and the template says what it should and nothing else."""

from __future__ import annotations

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plaudit_model.starter import CHAT_TEMPLATE, build_tokenizer, preference_records
from plaudit_model.starter.tokenizer import END, PAD, SPECIAL_TOKENS, START

TEXTS = [text for record in preference_records(200, 0) for text in (record.prompt[0].content, *record.responses)]
TOKENIZER = build_tokenizer(TEXTS, 1500)


def ids(text: str) -> list[int]:
    encoded: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return encoded


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_a_round_trip(text: str) -> None:
    assert TOKENIZER.decode(ids(text), skip_special_tokens=False) == text


def test_training_is_deterministic() -> None:
    assert build_tokenizer(TEXTS, 1500).to_str() == TOKENIZER.to_str()


def test_special_tokens_come_first_and_are_one_token_each() -> None:
    assert [ids(token) for token in SPECIAL_TOKENS] == [[0], [1], [2]]
    assert len({PAD, START, END}) == 3


def test_the_vocabulary_stays_in_its_limit() -> None:
    assert 3 + 256 < TOKENIZER.get_vocab_size() <= 1500


@pytest.mark.parametrize("number", ["7", "15", "180"])
def test_a_small_number_is_one_token(number: str) -> None:
    tokenizer = build_tokenizer([f"It is {number}."] * 50, 400)
    assert len(tokenizer.encode(number).ids) == 1


def test_words_of_the_generator_are_short() -> None:
    text = " ".join(TEXTS[:50])
    assert len(ids(text)) < 0.4 * len(text)


def test_the_template_renders_chatml() -> None:
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(CHAT_TEMPLATE)
    messages = [{"role": "user", "content": "Hi\n{{ 1 + 1 }}"}, {"role": "assistant", "content": ""}]
    rendered = template.render(messages=messages, add_generation_prompt=False)
    assert rendered == "<|im_start|>user\nHi\n{{ 1 + 1 }}<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    asked = template.render(messages=messages[:1], add_generation_prompt=True)
    assert asked == "<|im_start|>user\nHi\n{{ 1 + 1 }}<|im_end|>\n<|im_start|>assistant\n"
    assert rendered.startswith(asked)


def test_markers_of_the_template_are_tokens_of_their_own() -> None:
    encoded = ids("<|im_start|>user\nHi<|im_end|>\n")
    assert encoded[0] == TOKENIZER.token_to_id(START)
    assert encoded.count(TOKENIZER.token_to_id(END)) == 1
