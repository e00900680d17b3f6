"""What trainers read: one function a trainer, from a choice to its rows. Field names are theirs.

A prompt is written as messages, because that is how it was sampled and scored: the text of one user's message, or a
conversation. A raw prompt, which was continued as text, stays text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigurationError
from ..types import Prompt
from .rules import Candidate

Format = Literal["sft", "dpo", "kto", "openrlhf", "llamafactory"]
Task = Literal["sft", "dpo", "kto"]
_TAGS = {f"{role}_tag": role for role in ("role", "content", "user", "assistant", "system")}
DATASET_INFO: Mapping[Task, Mapping[str, Any]] = {
    "sft": {"columns": {"messages": "messages"}, "tags": _TAGS},
    "kto": {"columns": {"messages": "messages", "kto_tag": "label"}, "tags": _TAGS},
    "dpo": {"columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}, "ranking": True},
}
"""What LLaMA-Factory's `dataset_info.json` must say of a file, beside its name and `"formatting": "sharegpt"`."""


@dataclass(frozen=True, slots=True)
class Picked:
    """What was picked for a prompt. `pairs` are chosen and rejected; `plain`: written as text."""

    prompt: Prompt
    plain: bool
    chosen: Sequence[Candidate]
    pairs: Sequence[tuple[Candidate, Candidate]]

    @property
    def asked(self) -> Any:
        if self.plain or not isinstance(self.prompt, str):
            return self.prompt
        return [{"role": "user", "content": self.prompt}]

    def answered(self, candidate: Candidate) -> Any:
        return candidate.response if self.plain else [{"role": "assistant", "content": candidate.response}]

    def whole(self, candidate: Candidate) -> list[Any]:
        return [*self.asked, *self.answered(candidate)]

    def labelled(self) -> Iterator[tuple[Candidate, bool]]:
        """The chosen as desirable, each of the rejected once as undesirable."""
        yield from ((candidate, True) for candidate in self.chosen)
        yield from ((candidate, False) for candidate in dict.fromkeys(rejected for _, rejected in self.pairs))


def trl(picked: Picked, task: Task) -> Iterator[dict[str, Any]]:
    """TRL: prompt and completion (SFTTrainer); prompt, chosen, rejected (DPOTrainer); prompt, completion, label
    (KTOTrainer). Conversational where the prompt is."""
    prompt, answer = {"prompt": picked.asked}, picked.answered
    if task == "sft":
        yield from ({**prompt, "completion": answer(one)} for one in picked.chosen)
    elif task == "dpo":
        yield from ({**prompt, "chosen": answer(one), "rejected": answer(other)} for one, other in picked.pairs)
    else:
        yield from ({**prompt, "completion": answer(one), "label": label} for one, label in picked.labelled())


def openrlhf(picked: Picked, task: Task) -> Iterator[dict[str, Any]]:
    """OpenRLHF: input, output, reward; prompt, chosen, rejected and their rewards; output and label. Messages need
    --apply_chat_template there, and its KTO reader then takes the whole conversation from `output`."""
    asked, answer = picked.asked, picked.answered
    if task == "sft":
        yield from ({"input": asked, "output": answer(one), "reward": one.value} for one in picked.chosen)
    elif task == "dpo":
        for one, other in picked.pairs:
            chosen = {"chosen": answer(one), "chosen_reward": one.value}
            yield {"prompt": asked, **chosen, "rejected": answer(other), "rejected_reward": other.value}
    else:
        for one, label in picked.labelled():
            whole = {"prompt": asked, "output": answer(one)} if picked.plain else {"output": picked.whole(one)}
            yield {**whole, "label": label}


def llamafactory(picked: Picked, task: Task) -> Iterator[dict[str, Any]]:
    """LLaMA-Factory: messages; conversations, chosen, rejected (ShareGPT); messages and label. What to add to
    `dataset_info.json` is `DATASET_INFO`. Raises ConfigurationError for text: it applies a template of its own."""
    if picked.plain:
        raise ConfigurationError("LLaMA-Factory puts prompts into a template of its own: plain text cannot be written")
    if task == "dpo":
        asked = list(map(_sharegpt, picked.asked))
        for pair in picked.pairs:
            chosen, rejected = (_sharegpt(picked.answered(one)[0]) for one in pair)
            yield {"conversations": asked, "chosen": chosen, "rejected": rejected}
    elif task == "sft":
        yield from ({"messages": picked.whole(one)} for one in picked.chosen)
    else:
        yield from ({"messages": picked.whole(one), "label": label} for one, label in picked.labelled())


WRITERS: Mapping[Format, Callable[[Picked, Task], Iterator[dict[str, Any]]]] = {
    "sft": trl, "dpo": trl, "kto": trl, "openrlhf": openrlhf, "llamafactory": llamafactory,
}  # fmt: skip
"""The rows of a choice in a format."""


def _sharegpt(turn: Mapping[str, str]) -> dict[str, str]:
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    return {"from": names.get(turn["role"], turn["role"]), "value": turn["content"]}
