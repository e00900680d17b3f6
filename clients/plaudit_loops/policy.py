"""A policy: a causal language model with its tokenizer, and what it says of responses.

Shapes: B sequences, P the widest prompt (left-padded, so that responses begin in one column), R the longest response
(right-padded), H the hidden size. Dropout is off everywhere, so that the first ratio of an update is 1. Logits are
divided by the sampling temperature wherever a log-probability is taken.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from plaudit import Prompt
from plaudit_model import store
from plaudit_model.errors import CheckpointError, ModelError

LOG = logging.getLogger("plaudit.loops")

TokenIds = Sequence[int]
Prompted = tuple[TokenIds, TokenIds]
"""A prompt and a response, as token ids."""


class Said(NamedTuple):
    """What a model says of responses. Outside the mask everything is 0."""

    logprobs_BR: Tensor
    entropy_BR: Tensor
    mask_BR: Tensor
    hidden_BRH: Tensor


@dataclass(frozen=True, eq=False)
class Policy:
    """`module` is trained; `stop_ids` end a response; `pad_id` fills, and is never read. `origin` is the sha256 of each
    file that a run must find again to go on: its reference, or what lies below its adapter."""

    module: nn.Module
    tokenizer: Any
    stop_ids: frozenset[int]
    pad_id: int
    autocast: bool = False
    origin: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    @property
    def hidden_size(self) -> int:
        return int(self.module.get_output_embeddings().weight.shape[1])  # type: ignore[operator]

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt up to where the response begins: the chat template's, or those of the plain text if
        there is no template."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        if self.tokenizer.chat_template is None:
            if len(messages) != 1:
                raise ModelError("this policy has no chat template: its prompts must be texts, not messages")
            return list(self.tokenizer(messages[0]["content"])["input_ids"])
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_response(self, text: str) -> list[int]:
        """The ids of a whole response, its end token included."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end_id]

    def decode(self, ids: TokenIds) -> str:
        """The text of a response, without special tokens: what a reward model is to read."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @property
    def end_id(self) -> int:
        """The token that ends a response in training data."""
        eos = self.tokenizer.eos_token_id
        return int(eos) if eos in self.stop_ids else min(self.stop_ids)

    def say(self, pairs: Sequence[Prompted], temperature: float, module: nn.Module | None = None) -> Said:
        """Teacher-forced log-probabilities of responses; of another module with the same tokenizer, if given."""
        module = module or self.module
        ids_BL, mask_BL, positions_BL, response_BR = pad(pairs, self.pad_id, self.device)
        width = response_BR.shape[1]
        kept: list[Tensor] = []
        head: nn.Module = module.get_output_embeddings()  # type: ignore[operator]
        hook = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                logits_BRV = module(
                    input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions_BL, logits_to_keep=width + 1,
                    use_cache=False,
                ).logits[:, :-1]  # fmt: skip
        finally:
            hook.remove()
        logps_BRV = torch.log_softmax(logits_BRV.float() / temperature, -1)
        logprobs_BR = logps_BRV.gather(-1, ids_BL[:, -width:, None]).squeeze(-1)
        entropy_BR = -(logps_BRV.exp() * logps_BRV).sum(-1)
        hidden_BRH = kept[0][:, -width - 1 : -1].float()
        logprobs_BR, entropy_BR = (torch.where(response_BR, x_BR, 0.0) for x_BR in (logprobs_BR, entropy_BR))
        return Said(logprobs_BR, entropy_BR, response_BR, hidden_BRH)

    def save(self, directory: Path) -> None:
        """A directory that transformers loads, an adapter merged into it."""
        module: Any = self.module
        if hasattr(module, "merge_and_unload"):
            module = copy.deepcopy(module).merge_and_unload()
        with store.atomic_directory(directory) as staging:
            module.save_pretrained(staging)
            self.tokenizer.save_pretrained(staging)


def pad(pairs: Sequence[Prompted], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, attention mask and positions, each (B, P + R), and the mask of the responses (B, R); R is at least 1."""
    before, after = max(len(p) for p, _ in pairs), max(1, *(len(r) for _, r in pairs))
    ids_BL = torch.full((len(pairs), before + after), pad_id)
    mask_BL = torch.zeros_like(ids_BL)
    response_BR = torch.zeros((len(pairs), after), dtype=torch.bool)
    for row, (prompt, response) in enumerate(pairs):
        place = slice(before - len(prompt), before + len(response))
        ids_BL[row, place] = torch.tensor([*prompt, *response])
        mask_BL[row, place] = 1
        response_BR[row, : len(response)] = True
    positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
    return ids_BL.to(device), mask_BL.to(device), positions_BL.to(device), response_BR.to(device)


class Reference:
    """The policy as it was before training: a frozen copy or, for an adapter, the policy without it."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._copy = None
        if not hasattr(policy.module, "disable_adapter"):
            self._copy = copy.deepcopy(policy.module).requires_grad_(False).eval()

    @contextmanager
    def module(self) -> Iterator[nn.Module]:
        """The module to run while the block lasts."""
        if self._copy is not None:
            yield self._copy
            return
        with self._policy.module.disable_adapter():  # type: ignore[operator]
            yield self._policy.module


class ValueHead(nn.Module):
    """Values of states, from the policy's last hidden layer. It begins at 0: a remote reward model gives no weights
    to begin with."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_BRH: Tensor) -> Tensor:
        values_BR: Tensor = self.linear(hidden_BRH).squeeze(-1)
        return values_BR


def load_policy(directory: Path, *, device: str, autocast: bool, seed: int = 0) -> Policy:
    """A policy in fp32 from a directory; without weights there it starts from scratch, from `seed`.

    Raises CheckpointError for pickle weights and for what transformers cannot read.
    """
    if not directory.is_dir():  # transformers would take a Hub id, whose weights do not lie there
        raise CheckpointError(f"{directory} is no directory: name one with a causal language model")
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        for name in vars(config):
            if "drop" in name and isinstance(getattr(config, name), float):
                setattr(config, name, 0.0)
        module = _module(directory, config, seed)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory} is no causal language model that transformers reads: {error}") from error
    stops = _stop_ids(module, tokenizer)
    if not stops:
        raise CheckpointError(f"{directory} names no end-of-text token: no response would ever end")
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops)
    return Policy(module.to(device).eval(), tokenizer, stops, pad_id, autocast)


def _module(directory: Path, config: Any, seed: int) -> Any:
    transformers.utils.logging.disable_progress_bar()
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.bin")):
        store.check_weights(directory)
        return transformers.AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    LOG.info("%s has no weights: starting from scratch", directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _stop_ids(module: Any, tokenizer: Any) -> frozenset[int]:
    named = getattr(module.generation_config, "eos_token_id", None)
    found = named if isinstance(named, list) else [named]
    return frozenset(int(i) for i in (*found, tokenizer.eos_token_id) if i is not None)
