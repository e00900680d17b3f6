"""Text that a chat template has already rendered: whose template was it, and what did the conversation say?

Trainers decode prompt and response with the *policy's* template and special tokens. A reward model with another
template reads those as noise, and scores it without a complaint. The first marker in the text decides which
template rendered it: a marker after that may be something that somebody wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import get_args

from plaudit_model.errors import ItemError
from plaudit_model.records import Message, Role

from .settings import RenderedText

_ROLES: Mapping[str, Role] = {role: role for role in get_args(Role)} | {"ipython": "tool"}


@dataclass(frozen=True)
class Family:
    """One way of writing turns. A family without `turn` is recognised but not read.

    markers  what only this family writes
    turn     matches the beginning of a turn; its group `role` is the speaker's name
    ends     what closes a turn, where a template writes anything at all
    lead     what may stand before the first turn
    names    the template's words for the roles
    """

    name: str
    markers: tuple[str, ...]
    turn: re.Pattern[str] | None = None
    ends: tuple[str, ...] = ()
    lead: tuple[str, ...] = ()
    names: Mapping[str, Role] = field(default_factory=lambda: _ROLES)

    def position(self, text: str) -> int:
        """Where the first marker stands; -1 if there is none."""
        return min((at for marker in self.markers if (at := text.find(marker)) >= 0), default=-1)

    def conversation(self, text: str) -> list[Message] | None:
        """The turns of the text; None if it is not wholly of this form."""
        starts = list(self.turn.finditer(text)) if self.turn else []
        if not starts or text[: starts[0].start()].strip() not in ("", *self.lead):
            return None
        stops = [match.start() for match in starts[1:]] + [len(text)]
        turns = []
        for match, stop in zip(starts, stops, strict=True):
            role, content = self.names.get(match["role"]), self._content(text[match.end() : stop], stop < len(text))
            if role is None or content is None:
                return None
            turns.append(Message(role, content))
        return turns

    def _content(self, text: str, closed: bool) -> str | None:
        """What was said, without what closes the turn; None if anything else follows that."""
        found = [(at, end) for end in self.ends if (at := text.find(end)) >= 0]
        if not found:
            return text.removesuffix("\n") if closed else text
        at, _ = min(found)
        return text[:at] if not _without(text[at:], self.ends).strip() else None


@dataclass(frozen=True)
class _Inst(Family):
    """`<s>[INST] <<SYS>>..<</SYS>> user [/INST] assistant </s>`: the markers go around the user's words."""

    def conversation(self, text: str) -> list[Message] | None:
        turns: list[Message] = []
        end = 0
        if text.rfind("[INST]") > text.rfind("[/INST]"):
            return None  # and each that is not closed would be searched to the end of the text
        for match in _INST.finditer(text):
            if _without(text[end : match.start()], self.lead).strip():
                return None
            turns += self._exchange(match["user"], match["assistant"], first=not turns)
            end = match.end()
        return turns if turns and not _without(text[end:], self.lead).strip() else None

    def _exchange(self, user: str, assistant: str, *, first: bool) -> Iterator[Message]:
        if first and (system := _SYS.match(user)):
            yield Message("system", system[1])
            user = user[system.end() :]
        yield Message("user", user)
        yield Message("assistant", assistant.rstrip())


_INST = re.compile(r"\[INST\] ?(?P<user>.*?) ?\[/INST\] ?(?P<assistant>.*?)(?=</s>|<s>|\[INST\]|\Z)", re.DOTALL)
_SYS = re.compile(r"<<SYS>>\n(.*?)\n<</SYS>>\n\n", re.DOTALL)
_BAR, _LOW = "\uff5c", "\u2581"  # DeepSeek writes its markers with these

FAMILIES = (
    Family("ChatML", ("<|im_start|>",), re.compile(r"<\|im_start\|>(?P<role>\w+)(?:\n|<\|im_sep\|>)"),
           ("<|im_end|>", "<|endoftext|>"), ("<s>", "<|endoftext|>")),
    Family("Llama 3", ("<|start_header_id|>",),
           re.compile(r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>\n\n"),
           ("<|eot_id|>", "<|end_of_text|>"), ("<|begin_of_text|>",)),
    Family("Llama 4", ("<|header_start|>",), re.compile(r"<\|header_start\|>(?P<role>\w+)<\|header_end\|>\n\n"),
           ("<|eot|>",), ("<|begin_of_text|>",)),
    _Inst("Llama 2", ("[INST]",), lead=("<s>", "</s>")),
    Family("Gemma", ("<start_of_turn>",), re.compile(r"<start_of_turn>(?P<role>\w+)\n"), ("<end_of_turn>", "<eos>"),
           ("<bos>",), {"user": "user", "model": "assistant"}),
    Family("Granite", ("<|start_of_role|>",), re.compile(r"<\|start_of_role\|>(?P<role>\w+)<\|end_of_role\|>"),
           ("<|end_of_text|>",)),
    Family("Cohere", ("<|START_OF_TURN_TOKEN|>",),
           re.compile(r"<\|START_OF_TURN_TOKEN\|><\|(?P<role>[A-Z]+)_TOKEN\|>"), ("<|END_OF_TURN_TOKEN|>",),
           ("<BOS_TOKEN>",), {"SYSTEM": "system", "USER": "user", "CHATBOT": "assistant"}),
    Family("DeepSeek", (f"<{_BAR}User{_BAR}>", f"<{_BAR}Assistant{_BAR}>"),
           re.compile(f"<{_BAR}(?P<role>User|Assistant){_BAR}>"), (f"<{_BAR}end{_LOW}of{_LOW}sentence{_BAR}>",),
           (f"<{_BAR}begin{_LOW}of{_LOW}sentence{_BAR}>",), {"User": "user", "Assistant": "assistant"}),
    Family("Zephyr", ("<|user|>", "<|assistant|>", "<|system|>"),
           re.compile(r"<\|(?P<role>system|user|assistant)\|>\n"), ("</s>", "<|end|>", "<|endoftext|>"),
           ("<s>", "<|endoftext|>")),
    Family("Harmony", ("<|start|>",)),
)  # fmt: skip
"""ChatML is Qwen's, Yi's and Phi-4's too; Zephyr's form is also that of Phi-3, Tulu and OLMo."""


def family_of(text: str) -> Family | None:
    """The family whose marker stands first in the text; None if there is no marker."""
    found = [(at, number) for number, family in enumerate(FAMILIES) if (at := family.position(text)) >= 0]
    return FAMILIES[min(found)[1]] if found else None


@dataclass(frozen=True)
class RenderedRule:
    """What becomes of a rendered text before the model that reads `template` (Jinja) gets it."""

    policy: RenderedText
    template: str

    def conversation(self, text: str) -> list[Message] | None:
        """The conversation to be rendered anew, or None if the text is to be read as it is.

        Raises ItemError: `foreign_special_tokens` under `refuse`, `rendered_text_refused` under `rerender` where
        the conversation cannot be told.
        """
        family = family_of(text) if self.policy != "as-is" else None
        if family is None or any(marker in self.template for marker in family.markers):
            return None
        if self.policy == "refuse":
            raise ItemError(
                "foreign_special_tokens",
                f"the text is in the {family.name} template and this model reads another; send messages, or start the "
                "server with --rendered-text rerender (or as-is)",
            )
        turns = family.conversation(text)
        if turns is None or len(turns) < 2 or turns[-1].role != "assistant":
            raise ItemError(
                "rendered_text_refused",
                f"the text has {family.name} markers, but is no whole conversation that ends with the assistant's turn",
            )
        return turns


def _without(text: str, parts: tuple[str, ...]) -> str:
    for part in parts:
        text = text.replace(part, "")
    return text
