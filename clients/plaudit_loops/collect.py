"""A step's responses with all that is known of them before anything is updated: sampled, scored, evaluated.

Each process collects for its share of the prompts; then all of them hold all samples, so that baselines, whitening and
minibatches are the same in every process as they would be in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plaudit import Unavailable
from plaudit_model.interrupt import StopRequest

from .config import RlConfig
from .data import Encoded
from .policy import Policy, Prompted, Reference, ValueHead
from .rollout import Key, Response, Stream, sample, uniforms
from .scoring import Group, Rewards
from .sft import batches
from .shaping import Scores
from .world import World


@dataclass(frozen=True, eq=False)
class Sample:
    """One response. Tensors are (its tokens,) on the CPU. `scores` (E,) has a number for each endpoint, NaN for none;
    `baseline` (E,) is what the starting policy scores on the prompt, 0 if that is not asked for."""

    row: Encoded
    response: Response
    text: str
    scores: Scores
    baseline: Scores
    old: Tensor
    reference: Tensor
    values: Tensor
    entropy: Tensor

    @property
    def pair(self) -> Prompted:
        return self.row.prompt_ids, self.response.ids


class Collector:
    """Samples and scores. Random numbers are functions of (seed, step, sample); `baselines` are what a checkpoint must
    keep: what the starting policy scored on a prompt depends on the prompts that were met with it, and on which of its
    responses had a score. They are the same in every process."""

    def __init__(
        self, policy: Policy, values: ValueHead, rows: Sequence[Encoded], rewards: Rewards, config: RlConfig,
        world: World,
    ) -> None:  # fmt: skip
        self._policy, self._values, self._rows = policy, values, rows
        self._rewards, self._config, self._world = rewards, config, world
        self._reference = Reference(policy)
        self.baselines: dict[int, Scores] = {}

    def collect(self, step: int, chosen: Sequence[int], stop: StopRequest) -> list[Sample]:
        """`group_size` samples for each of the chosen rows, in their order; the same list in every process.

        Raises in all processes if one of them fails: Interrupted, PlauditError, LoopError.
        """
        samples = self._world.together(lambda: self._share(step, chosen), stop)
        if self._config.reward.normalize == "prompt":
            firsts = samples[:: self._config.rollout.group_size or 1]
            self.baselines |= {row: first.baseline for row, first in zip(chosen, firsts, strict=True)}
        return samples

    def score_reference(self, chosen: Sequence[int], stop: StopRequest) -> Scores:
        """Scores (E, S) of one response of the starting policy to each of the rows: the main process's, in all of them.
        Raises as `collect` does."""
        keys = [(i, 0) for i in range(len(chosen))]
        return self._world.together(lambda: [self._scored("reference", chosen, keys)[2]], stop)[0]

    def _share(self, step: int, chosen: Sequence[int]) -> list[Sample]:
        group, mine = self._config.rollout.group_size or 1, self._world.share(chosen)
        first = self._world.rank * len(mine) * group
        if self._config.reward.normalize == "prompt":
            self._fill_baselines(mine)
        keys = [(step, first + i) for i in range(len(mine) * group)]
        return self._evaluated([i for i in mine for _ in range(group)], *self._scored("rollout", mine, keys))

    def _fill_baselines(self, rows: Sequence[int]) -> None:
        """Mean scores (E,) of the starting policy on each prompt, of the responses that have one, sampled when the
        prompt is met first, and again as long as none has."""
        count = self._config.reward.reference_samples
        new = [i for i in dict.fromkeys(rows) if np.isnan(self.baselines.get(i, np.nan)).any()]
        if new:
            keys = [(i, sample) for i in new for sample in range(count)]
            *_, scores_ES = self._scored("reference", new, keys)
            scores_ENC = scores_ES.reshape(len(scores_ES), len(new), count)
            with np.errstate(invalid="ignore"):  # 0 / 0: no baseline
                means_NE = (np.nansum(scores_ENC, 2) / np.isfinite(scores_ENC).sum(2)).T
            self.baselines |= dict(zip(new, means_NE, strict=True))

    def _scored(
        self, stream: Stream, rows: Sequence[int], keys: Sequence[Key]
    ) -> tuple[list[Response], list[str], Scores]:
        """Responses, len(keys) / len(rows) to a row, their texts and their scores: a chunk is scored while the next is
        generated. Raises Unavailable if too many have none."""
        responses, texts, promises = list[Response](), list[str](), []
        for groups, made in self._generated(stream, rows, keys):
            promises.append(self._rewards.submit(groups))
            responses += made
            texts += [text for _, group in groups for text in group]
        scores_ES = np.concatenate([promise() for promise in promises], 1)
        failed = float(np.isnan(scores_ES).any(0).mean())
        if failed > self._config.reward.max_failed:
            raise Unavailable(f"{failed:.0%} of a step's responses have no score, more than reward.max_failed allows")
        return responses, texts, scores_ES

    def _generated(
        self, stream: Stream, rows: Sequence[int], keys: Sequence[Key]
    ) -> Iterator[tuple[list[Group], list[Response]]]:
        settings, group = self._config.rollout, len(keys) // len(rows)
        size = max(1, settings.rollout_batch // group)
        for start in range(0, len(rows), size):
            part = [self._rows[i] for i in rows[start : start + size]]
            noise_ST = uniforms(
                self._config.run.seed, stream, keys[start * group : (start + size) * group], settings.max_new_tokens
            )
            prompts = [row.prompt_ids for row in part]
            with self._reference.module() if stream == "reference" else nullcontext(self._policy.module) as module:
                made = sample(self._policy, prompts, noise_ST, temperature=settings.temperature, module=module)
            texts = [self._policy.decode(response.ids) for response in made]
            yield [(row.prompt, texts[i * group : (i + 1) * group]) for i, row in enumerate(part)], made

    @torch.no_grad()
    def _evaluated(
        self, rows: Sequence[int], responses: Sequence[Response], texts: Sequence[str], scores_ES: Scores
    ) -> list[Sample]:
        """Log-probabilities anew, by the forward that the update uses: sampling's differ in their last bits. Like with
        like, so that little is padding."""
        pairs = [(self._rows[i].prompt_ids, response.ids) for i, response in zip(rows, responses, strict=True)]
        found: dict[int, tuple[Tensor, ...]] = {}
        temperature = self._config.rollout.temperature
        by_length = sorted(range(len(pairs)), key=lambda s: sum(map(len, pairs[s])))
        for places in batches(by_length, self._config.optim.micro_batch):
            part = [pairs[s] for s in places]
            now = self._policy.say(part, temperature)
            with self._reference.module() as module:
                before = self._policy.say(part, temperature, module)
            all_BR = now.logprobs_BR, before.logprobs_BR, self._values(now.hidden_BRH), now.entropy_BR
            columns = [tensor.cpu() for tensor in all_BR]
            found |= {s: tuple(c[b, : len(pairs[s][1])] for c in columns) for b, s in enumerate(places)}
        none = np.zeros(len(scores_ES))
        return [
            Sample(self._rows[i], responses[s], texts[s], scores_ES[:, s], self.baselines.get(i, none), *found[s])
            for s, i in enumerate(rows)
        ]  # fmt: skip
