"""Reinforcement learning from a served reward model: rollout, scores, advantages, update."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plaudit import ConfigurationError, Unavailable
from plaudit_model.checkpoint import Tensors, load_tensors
from plaudit_model.interrupt import StopRequest

from . import batch as batches
from . import losses
from .batch import Batch, Unfinished
from .collect import Collector, Sample
from .config import RlConfig
from .data import Encoded, fingerprint, members
from .kl import kl_estimate, next_kl_coefficient
from .loop import Done
from .masked import masked_sum
from .optim import Trainable
from .policy import Policy, ValueHead
from .scoring import Rewards
from .sft import batches as slices

LOG = logging.getLogger("plaudit.loops")
_NOISE = 0.5
_UPDATE = (
    "loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio", "kl_loss",
    "val/clipfrac_avg", "val/ratio_var",
)  # fmt: skip


class Rl:
    """The stage of `plaudit rl`. Beside weights and optimiser its state is the KL coefficient, the score statistics,
    the pinned revisions, the baselines of the prompts that were met, an update that was interrupted and, with a KL
    budget, the last weights that were within it."""

    def __init__(
        self, policy: Policy, values: ValueHead, trainable: Trainable, rows: Sequence[Encoded], rewards: Rewards,
        config: RlConfig,
    ) -> None:  # fmt: skip
        world, self._per_step = trainable.world, config.rollout.prompts_per_step
        if self._per_step % world.size:
            raise ConfigurationError(
                f"rollout.prompts_per_step is {self._per_step}: not divisible by {world.size} processes"
            )
        self.policy, self.trainable, self.total, self.stopped = policy, trainable, config.steps, ""
        self.identity: Mapping[str, Any] = {
            "data": fingerprint(rows), "processes": world.size, "policy": dict(policy.origin),
        }  # fmt: skip
        self._values, self._rows, self._rewards, self._config = values, rows, rewards, config
        self._collector = Collector(policy, values, rows, rewards, config, world)
        assert config.kl.kl_coef is not None, "resolve the configuration first"
        self._kl_coef = config.kl.kl_coef
        self._statistics: np.ndarray[Any, np.dtype[np.float64]] | None = None
        self._within: dict[str, Tensor] = {}
        self._unfinished: Unfinished | None = None

    def take(self, step: int, stop: StopRequest) -> Done:
        begun = self._unfinished or self._collected(step, stop)
        metrics, kl = dict(begun.batch.metrics), begun.batch.metrics["objective/kl"]
        if self._unfinished is None and not self._keeps_budget(kl):
            return Done(metrics, begun.shown)
        self._unfinished = begun
        metrics |= self._update(step, begun, stop)
        # What the last update leaves is held to the budget as any other policy, though no step samples from it.
        if self._config.kl.kl_budget and step + 1 == self.total:
            after = [float((sample.old - sample.reference).sum()) for sample in self._sampled(self.total, stop)]
            metrics["objective/kl_after"] = fmean(after)
            self._keeps_budget(fmean(after))
        self._adapt(kl, len(begun.batch.pairs))
        self._unfinished = None
        return Done(metrics, begun.shown)

    def state(self) -> tuple[Mapping[str, Any], Mapping[str, Tensors]]:
        state: dict[str, Any] = {
            "kl_coef": self._kl_coef,
            "statistics": None if self._statistics is None else self._statistics.tolist(),
            "rewards": dict(self._rewards.state()),
        }
        tensors: dict[str, Tensors] = {"within": self._within} if self._within else {}
        if known := self._collector.baselines:
            means = torch.from_numpy(np.stack([*known.values()]))
            tensors["baselines"] = {"rows": torch.tensor([*known]), "means": means}
        if self._unfinished:
            state["unfinished"], tensors["unfinished"] = self._unfinished.state()
        return state, tensors

    def put_back(self, state: Mapping[str, Any], tensors: Mapping[str, Tensors]) -> None:
        self._kl_coef = state["kl_coef"]
        self._statistics = None if state["statistics"] is None else np.array(state["statistics"])
        self._rewards.put_back(state["rewards"])
        self._within = dict(tensors.get("within", {}))
        if "baselines" in tensors:
            rows, means = (tensors["baselines"][name] for name in ("rows", "means"))
            self._collector.baselines = dict(zip(rows.tolist(), means.numpy(), strict=True))
        if "unfinished" in state:
            self._unfinished = Unfinished.put_back(state["unfinished"], tensors["unfinished"])

    def _collected(self, step: int, stop: StopRequest) -> Unfinished:
        """A step up to its update: nothing has changed yet."""
        statistics, samples = self._normalisation(stop), self._sampled(step, stop)
        self._statistics = statistics  # with what was counted for them: nothing of a step is kept while it samples
        if statistics is None:
            statistics = np.stack([np.zeros(len(samples[0].scores)), np.ones(len(samples[0].scores))])
        batch = batches.build(samples, self._config, self._kl_coef, statistics)
        if (kl := batch.metrics["objective/kl"]) < -_NOISE:
            LOG.warning("KL is %.2f: negative beyond chance; were the responses sampled from this policy?", kl)
        metrics = {**batch.metrics, **self._rewards.counts(), "episodes": float((step + 1) * len(samples))}
        batch = replace(batch, metrics=metrics)
        sums = torch.zeros(self.trainable.world.size, len(_UPDATE) + 1, dtype=torch.float64)
        return Unfinished(batch, self._shown(step, samples), sums)

    def _sampled(self, step: int, stop: StopRequest) -> list[Sample]:
        chosen = members(len(self._rows), self._per_step, self._config.run.seed, step)
        return self._collector.collect(step, chosen, stop)

    # -- rewards and KL --------------------------------------------------------------------------------------

    def _normalisation(self, stop: StopRequest) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """Mean and deviation (2, E) of the starting policy's scores over some prompts, measured once."""
        settings = self._config.reward
        if settings.normalize != "reference" or self._statistics is not None:
            return self._statistics
        chosen = members(len(self._rows), self._per_step * settings.reference_samples, self._config.run.seed, 0)
        scores_ES = self._collector.score_reference(chosen, stop)
        if np.isnan(scores_ES).all(1).any():
            raise Unavailable("no response of the starting policy has a score to normalise by")
        deviation_E = np.nanstd(scores_ES, 1)
        return np.stack([np.nanmean(scores_ES, 1), np.where(deviation_E > 0, deviation_E, 1.0)])

    def _keeps_budget(self, kl: float) -> bool:
        """Whether the policy that was sampled from is within the KL budget. If not, the run ends with the last one that
        was."""
        budget = self._config.kl.kl_budget
        if not budget:
            return True
        if kl <= budget:
            self._within = self.trainable.weights()
            return True
        self.stopped = f"KL {kl:.3f} exceeds the budget of {budget:g}"
        if self._within:
            load_tensors(dict(self.trainable.named()), self._within)
        return False

    def _adapt(self, kl: float, samples: int) -> None:
        settings = self._config.kl
        if settings.kl_target:
            self._kl_coef = next_kl_coefficient(
                self._kl_coef, kl, target=settings.kl_target, samples=samples, horizon=settings.kl_horizon
            )

    def _shown(self, step: int, samples: Sequence[Sample]) -> tuple[Mapping[str, Any], ...]:
        if step % self._config.sample_every:
            return ()
        stride = self._config.rollout.group_size or 1
        return tuple(
            {"prompt": s.row.prompt, "response": s.text, "scores": [float(x) if x == x else None for x in s.scores],
             "kl": float((s.old - s.reference).sum()), "tokens": len(s.response.ids), "ended": s.response.ended}
            for s in samples[::stride][: self._config.samples]
        )  # fmt: skip

    # -- the update ------------------------------------------------------------------------------------------

    def _update(self, step: int, begun: Unfinished, stop: StopRequest) -> dict[str, float]:
        """Passes over the samples in minibatches, each an optimiser step; the first `begun.taken` of them are done. The
        passes may take minutes and a machine that is reclaimed has seconds: a signal ends the minibatch that it
        strikes, and `begun` is what a checkpoint keeps of those before."""
        settings, batch = self._config.algorithm, begun.batch
        warming = settings.algo == "ppo" and step < settings.value_warmup_steps
        for minibatch in islice(self._minibatches(step, len(batch.pairs)), begun.taken, None):
            if batch.mask_ST[minibatch].any():
                found = self.trainable.world.together(partial(self._gradients, batch, minibatch, warming), stop)
                begun.norm = max(begun.norm, self.trainable.update(only="value" if warming else None))
                begun.sums += torch.stack(found)
            begun.taken += 1
        sums = begun.sums.sum(0)
        means = (sums[:-1] / sums[-1].clamp(min=1)).tolist()
        values = dict(zip(_UPDATE, means, strict=True))
        values["val/ratio_var"] = max(values["val/ratio_var"] - values["val/ratio"] ** 2, 0.0)
        if settings.algo != "ppo":
            del values["loss/value_avg"], values["val/clipfrac_avg"]
        return {**values, "grad_norm": begun.norm}

    def _gradients(self, batch: Batch, minibatch: list[int], warming: bool) -> list[Tensor]:
        """Those of this process's part of the minibatch; its sums for the metrics."""
        self.trainable.optimizer.zero_grad(set_to_none=True)  # of a minibatch that was interrupted
        sums, mask_MT = torch.zeros(len(_UPDATE) + 1, dtype=torch.float64), batch.mask_ST[minibatch]
        totals = float(mask_MT.sum()), float(mask_MT.any(1).sum())
        mine = minibatch[self.trainable.world.rank :: self.trainable.world.size]
        mine.sort(key=lambda s: sum(map(len, batch.pairs[s])))
        for part in slices(mine, self._config.optim.micro_batch):
            loss, found = self._loss(batch, part, totals, warming)
            torch.autograd.backward(loss)
            sums += found
        return [sums]

    def _minibatches(self, step: int, count: int) -> Iterator[list[int]]:
        settings = self._config.algorithm
        size = math.ceil(count / settings.minibatches)
        for epoch in range(settings.ppo_epochs or 1):
            order = np.random.default_rng([self._config.run.seed, 1 + step, epoch]).permutation(count)
            yield from (list(part) for part in slices(order.tolist(), size))

    def _loss(self, batch: Batch, part: Sequence[int], totals: Sequence[float], warming: bool) -> tuple[Tensor, Tensor]:
        """The part's share of the minibatch's loss, and the sums for the metrics, the number of tokens last. `totals`:
        tokens and sequences of the minibatch over all processes, by which losses are divided."""
        settings = self._config.algorithm
        with torch.set_grad_enabled(not warming):
            said = self.policy.say([batch.pairs[s] for s in part], self._config.rollout.temperature)
        width = said.mask_BR.shape[1]
        mask, old, reference, advantages, returns, values_before = (
            x_ST[list(part), :width].to(self.policy.device)
            for x_ST in (batch.mask_ST, batch.old_ST, batch.reference_ST, batch.advantages_ST, batch.returns_ST,
                         batch.values_ST)
        )  # fmt: skip
        log_ratio = losses.log_ratio(said.logprobs_BR, old)
        clips = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
        policy = losses.clipped_policy_loss(log_ratio, advantages, **clips, dual_clip=settings.dual_clip or None)
        kl = torch.zeros_like(policy)
        if self._config.kl.kl_in == "loss":
            assert self._config.kl.kl_estimator is not None
            kl = kl_estimate(said.logprobs_BR, reference, self._config.kl.kl_estimator)
        actor = policy + self._kl_coef * kl - settings.entropy_coef * said.entropy_BR
        loss = torch.zeros((), device=mask.device)
        value = far = torch.zeros_like(policy)
        if not warming:
            loss = self._aggregated(actor, mask, totals)
        if settings.algo == "ppo":
            hidden = said.hidden_BRH.detach() if warming else said.hidden_BRH
            values = self._values(hidden)
            value = losses.clipped_value_loss(values, values_before, returns, clip=settings.value_clip)
            far = (values - values_before).abs() > settings.value_clip
            weight = 1.0 if warming else settings.vf_coef
            loss = loss + weight * masked_sum(value, mask) / totals[0]
        clipped = losses.clip_fraction(log_ratio, advantages, **clips)
        ratio = log_ratio.detach().double().exp()
        shown = (policy, value, 0.5 * log_ratio**2, clipped, ratio, kl, far, ratio**2)
        sums = [masked_sum(x.detach().double(), mask).cpu() for x in shown]
        return loss, torch.stack([*sums, mask.sum().double().cpu()])

    def _aggregated(self, loss: Tensor, mask: Tensor, sums: Sequence[float]) -> Tensor:
        how = self._config.algorithm.loss_aggregation
        assert how is not None, "resolve the configuration first"
        return losses.aggregate(loss, mask, how, total=sums[how != "token"], length=self._config.rollout.max_new_tokens)
