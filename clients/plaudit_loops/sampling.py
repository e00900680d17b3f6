"""Samples from a local causal language model, for files: `plaudit bon generate --policy`.

A sample is a function of the weights, the prompt, the settings and its index, and of nothing else. Each has a random
generator of its own, seeded with its key; the draw is made on the CPU in float64. The forward always computes
`batch_size` rows of one prompt, in the same shape whichever of them are wanted, because a product of matrices of
another shape rounds differently. For throughput over many prompts, put a generation server behind `--endpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from plaudit._row_files import digest
from plaudit.bon.samples import Generated, Sampling
from plaudit.errors import ConfigurationError
from plaudit.types import Prompt
from plaudit_model.store import check_weights, hash_files
from plaudit_model.template import writes_date


class LocalPolicy:
    """A model and its tokenizer. `name` tells the weights (a hash of the files, or the Hub's commit), the dtype and
    the device, all of which a sample depends on."""

    ahead = 1

    def __init__(self, source: str, how: Sampling) -> None:
        """Load `source`, a directory or a Hub id. Raises ConfigurationError, CheckpointError."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        local = Path(source).is_dir()
        if local:
            check_weights(Path(source))
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto", use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{source} cannot be loaded as a causal language model: {error}") from None
        self._model, self._how = model.to(device).eval(), how
        template = self._tokenizer.chat_template
        if not how.raw and (not isinstance(template, str) or writes_date(template)):
            raise ConfigurationError(
                f"{source} has no chat template, or one that writes today's date, with which a sample would not be the "
                "same tomorrow; pass --raw to continue text, or give it a template"
            )
        weights = (
            digest({k: v.sha256 for k, v in hash_files(Path(source)).items()}) if local else model.config._commit_hash
        )
        self.name = f"{Path(source).name if local else source}@{weights[:16]} ({model.dtype}, {device})"
        ends = model.generation_config.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ()) or {self._tokenizer.eos_token_id}
        self._longest = getattr(model.config, "max_position_embeddings", None)

    def sample(self, prompt: Prompt, keys: Sequence[str]) -> list[Generated]:
        """One response for each key, at most `batch_size` of them."""
        ids = self._encode(prompt)
        if not ids or (self._longest and len(ids) + self._how.max_new_tokens > self._longest):
            why = f"{len(ids)} tokens of prompt and {self._how.max_new_tokens} new ones do not fit into {self._longest}"
            return [Generated(None, failure={"code": "prompt_length", "message": why})] * len(keys)
        made = self._continue(ids, [Random(int(key, 16)) for key in keys])
        decode = self._tokenizer.decode
        return [
            Generated(decode(own, skip_special_tokens=True), "stop" if own[-1] in self._ends else "length", len(own))
            for own in made
        ]

    def close(self) -> None:
        """There is nothing to close."""

    def _encode(self, prompt: Prompt) -> list[int]:
        if self._how.raw:
            return list(self._tokenizer(prompt)["input_ids"])
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def _continue(self, ids: list[int], randoms: Sequence[Random]) -> list[list[int]]:
        """The new tokens of each row, the end of text included. The prompt is computed once."""
        rows, end = self._how.batch_size, min(self._ends)
        out = self._model(input_ids=torch.tensor([ids], device=self._model.device), use_cache=True, logits_to_keep=1)
        cache, logits_RV = out.past_key_values, out.logits[:, -1].expand(rows, -1)
        cache.batch_repeat_interleave(rows)
        made: list[list[int]] = [[] for _ in randoms]
        for _ in range(self._how.max_new_tokens):
            alive = [row for row, own in enumerate(made) if not own or own[-1] not in self._ends]
            if not alive:
                break
            drawn = draw(logits_RV[alive], [randoms[row].random() for row in alive], self._how)
            for row, token in zip(alive, drawn, strict=True):
                made[row].append(token)
            last = [own[-1] for own in made] + [end] * (rows - len(made))
            step_R1 = torch.tensor(last, device=self._model.device)[:, None]
            logits_RV = self._model(input_ids=step_R1, past_key_values=cache, use_cache=True).logits[:, -1]
        return made


def draw(logits_RV: Tensor, uniforms: Sequence[float], how: Sampling) -> list[int]:
    """One token a row, by inversion of the distribution function at a uniform number: softmax(logits / temperature),
    cut to the smallest set of likeliest tokens with mass `top_p` (Holtzman et al., 1904.09751). No other filter."""
    if how.temperature == 0:
        return logits_RV.argmax(-1).tolist()
    probabilities_RV = (logits_RV.double().cpu() / how.temperature).softmax(-1)
    tokens_RV = torch.arange(logits_RV.shape[-1]).expand_as(probabilities_RV)
    if how.top_p < 1:
        probabilities_RV, tokens_RV = probabilities_RV.sort(dim=-1, descending=True, stable=True)
        before_RV = probabilities_RV.cumsum(-1) - probabilities_RV
        probabilities_RV = probabilities_RV.where(before_RV < how.top_p, 0)
    mass_RV = probabilities_RV.cumsum(-1)
    wanted_R1 = torch.tensor(uniforms, dtype=torch.float64)[:, None] * mass_RV[:, -1:]
    places_R1 = torch.searchsorted(mass_RV, wanted_R1, right=True).clamp(max=mass_RV.shape[-1] - 1)
    return tokens_RV.gather(-1, places_R1)[:, 0].tolist()
