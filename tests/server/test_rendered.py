"""Text that another model's template rendered: recognised, refused, or read back to messages."""

import pytest

from plaudit_model.errors import ItemError
from plaudit_model.records import Message
from plaudit_model.template import CHATML
from plaudit_server.rendered import FAMILIES, RenderedRule, family_of

SYSTEM, USER, ASSISTANT = Message("system", "Be brief."), Message("user", "2 + 2?\n\nThink."), Message("assistant", "4")

RENDERED = {
    "ChatML": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?\n\nThink.<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>\n"
    ),
    "Llama 3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?\n\nThink.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
    ),
    "Llama 4": (
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|><|header_start|>user<|header_end|>"
        "\n\n2 + 2?\n\nThink.<|eot|><|header_start|>assistant<|header_end|>\n\n4<|eot|>"
    ),
    "Llama 2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n2 + 2?\n\nThink. [/INST] 4 </s>",
    "Gemma": ("<bos><start_of_turn>user\n2 + 2?\n\nThink.<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n<eos>"),
    "Granite": (
        "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>"
        "2 + 2?\n\nThink.<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>4<|end_of_text|>\n"
    ),
    "Cohere": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
        "<|USER_TOKEN|>2 + 2?\n\nThink.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>4"
        "<|END_OF_TURN_TOKEN|>"
    ),
    "DeepSeek": (
        "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>2 + 2?\n\nThink.<\uff5cAssistant\uff5c>4"
        "<\uff5cend\u2581of\u2581sentence\uff5c>"
    ),
    "Zephyr": "<|system|>\nBe brief.</s>\n<|user|>\n2 + 2?\n\nThink.</s>\n<|assistant|>\n4</s>\n",
}
WITHOUT_SYSTEM = {"Gemma", "DeepSeek"}
OTHER = "{{ messages[0]['content'] }}"


def test_every_family_that_can_be_read_is_tested():
    assert {family.name for family in FAMILIES} - set(RENDERED) == {"Harmony"}


@pytest.mark.parametrize("name", RENDERED)
def test_a_known_template_is_read_back_exactly(name):
    family = family_of(RENDERED[name])
    assert family is not None and family.name == name
    expected = [USER, ASSISTANT] if name in WITHOUT_SYSTEM else [SYSTEM, USER, ASSISTANT]
    assert RenderedRule("rerender", OTHER).conversation(RENDERED[name]) == expected


@pytest.mark.parametrize("name", RENDERED)
def test_another_models_template_is_refused_by_name(name):
    with pytest.raises(ItemError, match=f"{name} template") as caught:
        RenderedRule("refuse", OTHER).conversation(RENDERED[name])
    assert caught.value.code == "foreign_special_tokens"


def test_the_models_own_template_plain_text_and_as_is_pass_unchanged():
    for policy in ("refuse", "rerender", "as-is"):
        assert RenderedRule(policy, CHATML).conversation(RENDERED["ChatML"]) is None
        assert RenderedRule(policy, OTHER).conversation("Human: hi\n\nAssistant: hello") is None
    assert RenderedRule("as-is", OTHER).conversation(RENDERED["Gemma"]) is None


def test_a_marker_that_somebody_wrote_inside_a_turn_is_just_text():
    text = RENDERED["ChatML"].replace("2 + 2?", "what does [INST] or <|user|> mean?")
    assert RenderedRule("refuse", CHATML).conversation(text) is None
    turns = RenderedRule("rerender", OTHER).conversation(text)
    assert turns is not None and turns[1].content == "what does [INST] or <|user|> mean?\n\nThink."


def test_several_exchanges_and_a_response_that_was_cut_off():
    text = "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d e"
    assert RenderedRule("rerender", OTHER).conversation(text) == [
        Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d e"),
    ]  # fmt: skip
    cut = "<|user|>\na<|end|>\n<|assistant|>\nb is"
    assert RenderedRule("rerender", OTHER).conversation(cut) == [Message("user", "a"), Message("assistant", "b is")]
    tulu = "<|user|>\na\n<|assistant|>\nb<|endoftext|>"
    assert RenderedRule("rerender", OTHER).conversation(tulu) == [Message("user", "a"), Message("assistant", "b")]


def test_a_megabyte_is_read_as_fast_as_it_is_long():
    """Searched anew from each space, or from each marker that is not closed, it took hours: the test's limit tells."""
    rerender, length = RenderedRule("rerender", OTHER), 1 << 20
    assert rerender.conversation("[INST] a [/INST] b" + " " * length + "c")[1].content == "b" + " " * length + "c"
    for text in ("[INST]" * (length // 6), "[INST] a [/INST] b" + "[INST]" * (length // 6)):
        with pytest.raises(ItemError):
            rerender.conversation(text)


def test_an_empty_response_is_a_response():
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    assert RenderedRule("rerender", OTHER).conversation(text) == [Message("user", "a"), Message("assistant", "")]


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\na<|im_end|>\n",
        "<|im_start|>user\na<|im_end|>\nsomething<|im_start|>assistant\nb<|im_end|>",
        "<|im_start|>narrator\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>",
        "before <|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>",
        "<|im_start|>user a<|im_end|>",
        "[INST] a",
        "x [INST] a [/INST] b",
        "<|start|>user<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
    ],
)
def test_what_cannot_be_read_with_certainty_is_refused_not_guessed(text):
    with pytest.raises(ItemError) as caught:
        RenderedRule("rerender", OTHER).conversation(text)
    assert caught.value.code == "rendered_text_refused"
    assert "narrator" not in caught.value.message
