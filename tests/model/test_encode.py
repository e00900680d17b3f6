"""Conversation -> ids: boundary, truncation, text that is not text."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plaudit_model.contract import Template, Tokens
from plaudit_model.encode import Encoder
from plaudit_model.errors import ItemError
from plaudit_model.infer import resolve
from plaudit_model.records import Message

ModelDir = Callable[[str], Path]


@pytest.fixture
def chat(reward_model_dir: ModelDir) -> Encoder:
    return Encoder.open(reward_model_dir("qwen3"))


@pytest.fixture
def pair(reward_model_dir: ModelDir) -> Encoder:
    return Encoder.open(reward_model_dir("bert"))


@pytest.fixture
def unmarked(reward_model_dir: ModelDir) -> Encoder:
    """RoBERTa's: no token type tells prompt and response apart."""
    return Encoder.open(reward_model_dir("roberta"))


def limited(encoder: Encoder, max_length: int) -> Encoder:
    contract = replace(encoder.contract, max_length=max_length)
    return Encoder(encoder._tokenizer._json, encoder._special_tokens, contract, typed=encoder._typed)


def test_the_boundary_lies_where_the_response_begins(chat: Encoder, pair: Encoder, unmarked: Encoder) -> None:
    for encoder in (chat, pair, unmarked):
        one, other = (
            encoder.encode("Why is the sky blue?", "Scattering."),
            encoder.encode("Why is the sky blue?", "No."),
        )
        assert one.prompt_tokens == other.prompt_tokens
        assert one.ids[: one.prompt_tokens].tolist() == other.ids[: other.prompt_tokens].tolist()
        assert one.ids[one.prompt_tokens] != other.ids[other.prompt_tokens]


def test_a_text_prompt_is_one_user_message(chat: Encoder) -> None:
    whole = chat.encode_conversation([Message("user", "Hi"), Message("assistant", "Hello")])
    assert chat.encode("Hi", "Hello").ids.tolist() == whole.ids.tolist()


@settings(max_examples=60)
@given(prompt=st.text(max_size=40), response=st.text(max_size=40))
def test_any_text_is_encoded_and_decodes_to_itself(reward_model_dir: ModelDir, prompt: str, response: str) -> None:
    encoder = Encoder.open(reward_model_dir("qwen3"))
    encoded = encoder.encode(prompt, response)
    text = encoder.decode(encoded.ids.tolist())
    assert text == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"


@pytest.mark.parametrize("kind", ["chat", "pair", "unmarked"])
def test_an_over_long_item_is_an_error_unless_asked_otherwise(kind: str, request: pytest.FixtureRequest) -> None:
    encoder: Encoder = request.getfixturevalue(kind)
    full = encoder.encode("word " * 50, "An answer.")
    short = limited(encoder, len(full.ids) - 9)
    with pytest.raises(ItemError, match="limit is .*overlong=truncate_prompt") as caught:
        short.encode("word " * 50, "An answer.")
    assert caught.value.code == "too_long"
    cut = short.encode("word " * 50, "An answer.", "truncate_prompt")
    assert len(cut.ids) == len(full.ids) - 9
    assert cut.truncated is not None and (cut.truncated.side, cut.truncated.tokens) == ("prompt", 9)
    own = full.ids[full.prompt_tokens :].tolist()
    assert cut.ids[cut.prompt_tokens :].tolist() == own, "the response and its suffix are kept whole"


def test_a_limit_that_does_not_bind_changes_nothing(chat: Encoder) -> None:
    full = chat.encode("word " * 50, "An answer.")
    exactly = limited(chat, len(full.ids)).encode("word " * 50, "An answer.", "truncate_prompt")
    assert exactly.truncated is None and exactly.ids.tolist() == full.ids.tolist()


def test_cutting_the_prompt_cannot_save_a_response_that_is_too_long(chat: Encoder, unmarked: Encoder) -> None:
    for encoder in (chat, unmarked):
        with pytest.raises(ItemError, match="response alone"):
            limited(encoder, 20).encode("Hi", "word " * 50, "truncate_prompt")


def test_a_pair_keeps_its_first_token_when_it_is_cut(pair: Encoder, unmarked: Encoder) -> None:
    for encoder in (pair, unmarked):
        full = encoder.encode("word " * 50, "An answer.")
        cut = limited(encoder, len(full.ids) - 5).encode("word " * 50, "An answer.", "truncate_prompt")
        assert cut.ids[0] == full.ids[0] and cut.prompt_tokens == full.prompt_tokens - 5
        assert cut.ids[cut.prompt_tokens - 1 :].tolist() == full.ids[full.prompt_tokens - 1 :].tolist()


@pytest.mark.parametrize("config", [{"type_vocab_size": 2}, {}])
def test_a_boundary_that_no_token_type_marks_gives_none(
    config: dict[str, int], unmarked: Encoder, write_base: ModelDir, tmp_path: Path
) -> None:
    """As in a BERT with XLM-R's tokenizer: 1 would be read as the type of the response, which it never was."""
    shutil.copytree(write_base("roberta"), tmp_path / "base")
    known = json.loads((tmp_path / "base/config.json").read_text())
    del known["type_vocab_size"]
    (tmp_path / "base/config.json").write_text(json.dumps(known | config))
    typed = Encoder.open(tmp_path / "base", unmarked.contract)
    here, there = (encoder.encode("word " * 50, "An answer.") for encoder in (typed, unmarked))
    assert here.prompt_tokens == 0 and there.prompt_tokens > 0 and here.ids.tolist() == there.ids.tolist()
    here, there = (
        limited(encoder, 40).encode("word " * 50, "An answer.", "truncate_prompt") for encoder in (typed, unmarked)
    )
    assert here.prompt_tokens == 0 and here.ids.tolist() == there.ids.tolist() and here.truncated == there.truncated


def test_rendered_text_is_cut_on_the_left(chat: Encoder) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    full = chat.encode_text(text)
    assert full.ids.tolist() == chat.encode("Hi", "Hello").ids.tolist()
    cut = limited(chat, 5).encode_text(text, "truncate_left")
    assert cut.ids.tolist() == full.ids[-5:].tolist()
    assert cut.truncated is not None and cut.truncated.side == "left"


def test_rendered_text_ends_as_the_template_does(chat: Encoder) -> None:
    """Policies stop at the end of their turn; behind it the template writes a line break, and there the head reads."""
    whole = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    expected = chat.encode("Hi", "Hello").ids.tolist()
    assert chat.encode_text(whole).ids.tolist() == chat.encode_text(whole[:-1]).ids.tolist() == expected
    assert chat.encode_text(whole.removesuffix("<|im_end|>\n")).ids.tolist() == expected[:-2], (
        "a turn that was cut stays so"
    )
    turn = "{{ '<|im_start|>' ~ m['role'] ~ '\\n' ~ m['content'] ~ '<|im_end|>' }}"
    for source in (f"{{% for m in messages %}}{turn}{{% endfor %}}", "{{ raise_exception('no') }}"):
        template = Template.of("chat", source)
        other = Encoder(chat._tokenizer._json, {}, replace(chat.contract, template=template))
        assert other.encode_text(whole[:-1]).ids.tolist() == expected[:-1], "nothing is written behind a turn"


def test_what_a_template_writes_around_an_answer_may_hold_the_word(chat: Encoder) -> None:
    """Else every text that ends in `>` would get a line break."""
    source = "{% for m in messages %}{{ '<answer>' ~ m['content'] ~ '</answer>\n' }}{% endfor %}"
    encoder = Encoder(chat._tokenizer._json, {}, replace(chat.contract, template=Template.of("chat", source)))
    as_is, whole = encoder.encode_text("a > b >"), encoder.encode_text("<answer>a</answer>")
    assert as_is.ids.tolist() == chat.encode_text("a > b >").ids.tolist()
    assert whole.ids.tolist() == chat.encode_text("<answer>a</answer>\n").ids.tolist()


def test_a_template_may_refuse_a_conversation_without_an_answer(chat: Encoder) -> None:
    source = "{{ bos_token if messages[-1]['role'] == 'assistant' else raise_exception('no answer') }}"
    contract = replace(chat.contract, template=Template.of("chat", source))
    assert Encoder(chat._tokenizer._json, {"bos_token": "[CLS]"}, contract).opening() == "[CLS]"


def test_the_opening_is_the_bos_that_the_template_writes(chat: Encoder, pair: Encoder) -> None:
    special = {"bos_token": "[CLS]"}
    template = Template.of("chat", "{{ bos_token }}" + chat.contract.template.source)
    assert Encoder(chat._tokenizer._json, special, replace(chat.contract, template=template)).opening() == "[CLS]"
    assert Encoder(chat._tokenizer._json, special, chat.contract).opening() == ""
    assert chat.opening() == pair.opening() == ""


def test_bos_is_added_once(chat: Encoder) -> None:
    contract = replace(chat.contract, tokens=Tokens(bos="add", suffix=(7,)))
    encoder = Encoder(chat._tokenizer._json, {"bos_token": "<|im_start|>"}, contract)
    assert encoder.encode_text("Hi").ids.tolist()[:1] == [1]
    assert encoder.encode_text("<|im_start|>Hi").ids.tolist().count(1) == 1
    assert encoder.encode_text("Hi").ids.tolist()[-1] == 7


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda e: e.encode("lone \ud800 surrogate", "x"), "invalid_unicode"),
        (lambda e: e.encode("x", "\udfff"), "invalid_unicode"),
        (lambda e: e.encode_text("\ud800"), "invalid_unicode"),
        (lambda e: e.encode_text(""), "empty_input"),
        (lambda e: e.encode([], "x"), "invalid_messages"),
        (lambda e: e.encode_conversation([Message("user", "no answer")]), "invalid_messages"),
        (lambda e: e.encode_ids([1, 2, 10**6]), "invalid_token_ids"),
        (lambda e: e.encode_ids([1, 2], 3), "invalid_token_ids"),
        (lambda e: e.encode_ids([]), "empty_input"),
    ],
)
def test_what_is_not_an_item_has_a_code(chat: Encoder, call: Callable[[Encoder], object], code: str) -> None:
    with pytest.raises(ItemError) as caught:
        call(chat)
    assert caught.value.code == code


def test_an_empty_response_is_scored(chat: Encoder, pair: Encoder, unmarked: Encoder) -> None:
    for encoder in (chat, pair, unmarked):
        encoded = encoder.encode("Hi", "")
        assert len(encoded.ids) > encoded.prompt_tokens == encoder.encode("Hi", "x").prompt_tokens


def test_clones_encode_alike_in_many_threads(chat: Encoder) -> None:
    texts = [f"item {i} " * (i % 20 + 1) for i in range(200)]
    expected = [chat.encode(t, t).ids.tolist() for t in texts]
    wrong: list[int] = []

    def work(encoder: Encoder) -> None:
        wrong.extend(i for i, t in enumerate(texts) if encoder.encode(t, t).ids.tolist() != expected[i])

    threads = [threading.Thread(target=work, args=(chat.clone(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_directory_resolves_to_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
