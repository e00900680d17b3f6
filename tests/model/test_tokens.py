"""Token ids and boundaries: what is told from less work is what the tokenizer's own offsets tell."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from plaudit_model.tokens import STEM_TOKENS, STEMS, BoundedTokenizer, _ending_by, _marks


def byte_level(trim_offsets: bool, normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def metaspace_first() -> Tokenizer:
    tokenizer = metaspace()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


def prepending() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def trained(tokenizer: Tokenizer) -> Tokenizer:
    words = ["the lazy dog, two  spaces and na\u00efve caf\u00e9s \U0001f600\n\n"] * 3
    trainer = trainers.WordPieceTrainer if isinstance(tokenizer.model, models.WordPiece) else trainers.BpeTrainer
    special = ["<unk>", "<|end|>", "<|start|>"]
    tokenizer.train_from_iterator(words, trainer(vocab_size=400, special_tokens=special, show_progress=False))
    tokenizer.add_tokens([AddedToken("<think>", normalized=True), AddedToken("<gap>", lstrip=True, rstrip=True)])
    return tokenizer


TOKENIZERS = {
    "byte-level": byte_level(trim_offsets=False),
    "byte-level, NFC": byte_level(trim_offsets=False, normalizer=normalizers.NFC()),
    "byte-level, lower case": byte_level(trim_offsets=False, normalizer=normalizers.Lowercase()),
    "metaspace": metaspace(),
    "metaspace, first": metaspace_first(),
    "prepended": prepending(),
    "word pieces": word_piece(),
}
for each in TOKENIZERS.values():
    trained(each)
PIECES = [
    "the ", "lazy", " dog,", "  ", "\n\n", "\n", "caf\u00e9", "e\u0301", "\U0001f600", "<|end|>", "<|start|>",
    "<think>", "<gap>", "<unk>", "<|", "|>", "assistant\n",
]  # fmt: skip
texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


def by_offsets(tokenizer: Tokenizer, text: str, boundary: int) -> tuple[list[int], int]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    before = itertools.takewhile(lambda offsets: offsets[1] <= boundary, encoding.offsets)
    return encoding.ids, len(list(before))


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150)
@given(text=texts, data=st.data())
def test_ids_and_boundary_are_those_of_the_tokenizer_and_its_offsets(kind: str, text: str, data: st.DataObject) -> None:
    boundary = data.draw(st.integers(0, len(text)))
    bounded = BoundedTokenizer(TOKENIZERS[kind].to_str()).bounded(text, boundary)
    assert bounded == by_offsets(TOKENIZERS[kind], text, boundary)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150)
@given(head=texts, tails=st.lists(texts, min_size=2, max_size=4))
def test_what_begins_like_an_earlier_text_gets_the_ids_that_it_gets_alone(
    kind: str, head: str, tails: list[str]
) -> None:
    warm = BoundedTokenizer(TOKENIZERS[kind].to_str())
    for tail in tails:
        assert warm.bounded(head + tail, len(head)) == by_offsets(TOKENIZERS[kind], head + tail, len(head))


def test_a_prompt_that_ends_in_a_special_token_is_tokenised_once() -> None:
    warm = BoundedTokenizer(TOKENIZERS["byte-level"].to_str())
    head = "<|start|>the lazy dog<|end|>\n<|start|>assistant\n"
    for tail in ("one", "two"):
        warm.bounded(head + tail, len(head))
    (stem,) = warm._stems.values()
    assert head[stem.cut :] == "<|start|>assistant\n"
    assert stem.ids == TOKENIZERS["byte-level"].encode(head[: stem.cut], add_special_tokens=False).ids


def test_few_beginnings_are_kept_however_many_come() -> None:
    warm = BoundedTokenizer(TOKENIZERS["byte-level"].to_str())
    for number in range(3 * STEMS):
        head = f"<|start|>{number} the lazy dog<|end|>\n<|start|>"
        warm.bounded(head + "tail", len(head))
    assert len(warm._stems) == STEMS
    assert warm._stem_tokens == sum(len(stem.ids) for stem in warm._stems.values())
    long = "<|start|>" + "\n\nx" * STEM_TOKENS + "<|end|>"
    warm.bounded(long, len(long))
    assert warm._stem_tokens == sum(len(stem.ids) for stem in warm._stems.values()) <= STEM_TOKENS


def test_a_text_is_cut_only_at_tokens_that_nothing_around_them_can_change() -> None:
    plain = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    tokens = [
        plain | {"id": 0, "content": "<|end|>"},
        plain | {"id": 1, "content": "<|end|><|next|>"},  # 0 is its beginning, and it holds 0
        plain | {"id": 2, "content": "<a", "special": False},  # ends as 3 begins
        plain | {"id": 3, "content": "a>"},
        plain | {"id": 4, "content": "<b>", "lstrip": True},
        plain | {"id": 5, "content": "<c>", "normalized": True},
        plain | {"id": 6, "content": "<d>", "special": False},
        plain | {"id": 7, "content": "xyx"},  # overlaps itself
        plain | {"id": 8, "content": "<good>"},
        plain | {"id": 9, "content": "<unk>"},
        plain | {"id": 10, "content": "<other unk>"},
    ]
    model = {"unk_token": "<unk>", "unk_id": 10}
    assert _marks({"added_tokens": tokens, "model": model}) == {8: "<good>"}


@settings(max_examples=300)
@given(text=texts, kind=st.sampled_from(sorted(TOKENIZERS)), data=st.data())
def test_the_boundary_is_where_the_offsets_put_it(text: str, kind: str, data: st.DataObject) -> None:
    encoding = TOKENIZERS[kind].encode(text, add_special_tokens=False)
    boundary = data.draw(st.integers(0, len(text)))
    assert _ending_by(encoding, boundary) == by_offsets(TOKENIZERS[kind], text, boundary)[1]


def test_the_boundary_is_where_the_offsets_put_it_in_real_conversations(shared_data: Path) -> None:
    path = shared_data / "hh_rlhf" / "harmless-base" / "half_a.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        conversations = [json.loads(line)["chosen"] for line in itertools.islice(lines, 150)]
    for kind, tokenizer in TOKENIZERS.items():
        bounded = BoundedTokenizer(tokenizer.to_str())
        for text in conversations[:40]:
            for boundary in range(0, len(text), 97):
                assert bounded.bounded(text, boundary) == by_offsets(tokenizer, text, boundary), (kind, boundary)


@pytest.mark.parametrize(("template", "closing"), [
    ("[CLS] $A [SEP] [SEP] $B [SEP]", 1), ("[CLS] $A [SEP] $B", 0), ("$A [SEP] $B [SEP] [SEP]", 2),
])  # fmt: skip
def test_the_second_text_of_a_pair_begins_where_it_would_if_it_had_tokens(template: str, closing: int) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair=template, special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    bounded = BoundedTokenizer(tokenizer.to_str())
    ids, boundary, marked = bounded.pair("a b", "")
    assert not marked and len(ids) - boundary == closing
    longer, same, _ = bounded.pair("a b", "b a")
    assert same == boundary and longer[:boundary] == ids[:boundary] and longer[boundary : boundary + 2] == [4, 3]


def test_the_highest_id_bounds_what_a_vocabulary_with_holes_can_give() -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 9}, unk_token="[UNK]"))
    bounded = BoundedTokenizer(tokenizer.to_str())
    assert bounded.ids("b", special_tokens=False) == [9] and bounded.vocabulary == 10
