"""Sampling from a local policy: plain, at a temperature, with a KV cache and the log-probability of each token.

No top-k, no top-p, no penalties, no shortest length: any of them samples from another distribution than the one whose
log-probabilities are taken, and the KL comes out negative. Each sample has its own random numbers, a function of
(seed, step, sample) alone: what is sampled depends neither on the batch nor on how many processes share it, and a
resumed run samples what it would have sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .policy import Policy, TokenIds, pad

Stream = Literal["rollout", "reference", "evaluation"]
_STREAMS: dict[Stream, int] = {"rollout": 0, "reference": 1, "evaluation": 2}


@dataclass(frozen=True)
class Response:
    """One sampled response. `ids` include the end token if it `ended`; otherwise the length limit cut it off.
    `logprobs` are those it was sampled with."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool


Key = tuple[int, int]
"""A step (or a row) and a sample in it: where a sample's random numbers come from, besides seed and stream."""


def uniforms(seed: int, stream: Stream, keys: Sequence[Key], length: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), (len(keys), length), by a counter-based generator (Philox; Salmon et al., SC 2011)."""
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, _STREAMS[stream], index])).random(length)
        for step, index in keys
    ]
    return np.stack(rows) if rows else np.zeros((0, length))


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[TokenIds],
    uniforms_ST: NDArray[np.float64],
    *,
    temperature: float,
    module: nn.Module | None = None,
) -> list[Response]:
    """S / len(prompts) responses to each prompt, in its order, of at most T tokens.

    A prompt is computed once for all its responses; rows that have ended leave the batch when half of it has.
    """
    module = module or policy.module
    was_training, repeats = module.training, len(uniforms_ST) // len(prompts)
    module.eval()
    try:
        return _Sampling(policy, module, prompts, repeats, temperature).run(uniforms_ST)
    finally:
        module.train(was_training)


class _Sampling:
    """The rows that are still growing, with their cache."""

    def __init__(
        self, policy: Policy, module: nn.Module, prompts: Sequence[TokenIds], repeats: int, temperature: float
    ) -> None:
        self._policy, self._module, self._temperature = policy, module, temperature
        ids_BL, mask_BL, positions_BL, _ = pad([(prompt, ()) for prompt in prompts], policy.pad_id, policy.device)
        # `pad` leaves one column for a response; a prompt alone has none.
        out = self._forward(ids_BL[:, :-1], mask_BL[:, :-1], positions_BL[:, :-1], None)
        self._cache = out.past_key_values
        self._cache.batch_repeat_interleave(repeats)
        self._mask_NL = mask_BL[:, :-1].repeat_interleave(repeats, 0)
        self._position_N = positions_BL[:, -2].repeat_interleave(repeats, 0)
        self._logits_NV: Tensor = out.logits[:, -1].repeat_interleave(repeats, 0)
        self._rows = torch.arange(len(prompts) * repeats, device=policy.device)

    def run(self, uniforms_ST: NDArray[np.float64]) -> list[Response]:
        count, length = uniforms_ST.shape
        device = self._policy.device
        u_ST = torch.from_numpy(uniforms_ST).to(device)
        stops = torch.tensor(sorted(self._policy.stop_ids), device=device)
        ids_ST = torch.zeros((count, length), dtype=torch.long, device=device)
        logprobs_ST = torch.zeros((count, length), device=device)
        lengths_S = torch.full((count,), length, device=device)
        ended_S = torch.zeros(count, dtype=torch.bool, device=device)
        for t in range(length):
            tokens_N, logprobs_N = draw(self._logits_NV, u_ST[self._rows, t], self._temperature)
            ids_ST[self._rows, t], logprobs_ST[self._rows, t] = tokens_N, logprobs_N
            stopped_N = torch.isin(tokens_N, stops) & ~ended_S[self._rows]
            ended_S[self._rows[stopped_N]] = True
            lengths_S[self._rows[stopped_N]] = t + 1
            if bool(ended_S.all()) or t + 1 == length:
                break
            tokens_N = self._compact(tokens_N, ended_S)
            self._advance(tokens_N)
        return [
            Response(tuple(ids[:n]), tuple(logprobs[:n]), ended)
            for ids, logprobs, n, ended in zip(
                ids_ST.tolist(), logprobs_ST.tolist(), lengths_S.tolist(), ended_S.tolist(), strict=True
            )
        ]

    def _compact(self, tokens_N: Tensor, ended_S: Tensor) -> Tensor:
        alive = torch.nonzero(~ended_S[self._rows])[:, 0]
        if 2 * len(alive) > len(self._rows):
            return tokens_N
        self._cache.batch_select_indices(alive)
        self._mask_NL, self._position_N = self._mask_NL[alive], self._position_N[alive]
        self._rows = self._rows[alive]
        return tokens_N[alive]

    def _advance(self, tokens_N: Tensor) -> None:
        self._position_N = self._position_N + 1
        self._mask_NL = torch.cat([self._mask_NL, torch.ones_like(self._mask_NL[:, :1])], 1)
        out = self._forward(tokens_N[:, None], self._mask_NL, self._position_N[:, None], self._cache)
        self._logits_NV = out.logits[:, -1]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Any:
        with torch.autocast(self._policy.device.type, torch.bfloat16, enabled=self._policy.autocast):
            return self._module(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip


def draw(logits_NV: Tensor, u_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens (N,) and their log-probabilities (N,) fp32: the inverse of the cumulative distribution at `u_N`, summed
    in fp64, where the rounding of a large vocabulary's sum shifts no choice that could be noticed."""
    logps_NV = torch.log_softmax(logits_NV.float() / temperature, -1)
    cumulative_NV = logps_NV.double().exp().cumsum(-1)
    point_N1 = (u_N.double() * cumulative_NV[:, -1])[:, None]
    tokens_N1 = torch.searchsorted(cumulative_NV, point_N1, right=True).clamp(max=logits_NV.shape[1] - 1)
    return tokens_N1[:, 0], logps_NV.gather(1, tokens_N1)[:, 0]
