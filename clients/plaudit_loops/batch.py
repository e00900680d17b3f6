"""Samples as padded tensors with their advantages: all that an update needs, and what is kept of an interrupted one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plaudit_model.checkpoint import Tensors

from . import advantages, shaping
from .collect import Sample
from .config import RlConfig
from .masked import explained_variance, masked_mean, masked_var, whiten
from .policy import Prompted


@dataclass(frozen=True, eq=False)
class Batch:
    """S samples (`pairs`), T tokens of the longest. `mask_ST`: tokens that count in the update: those of samples that
    have a score and, if so configured, have ended. Everything is 0 outside its mask."""

    pairs: Sequence[Prompted]
    mask_ST: Tensor
    old_ST: Tensor
    reference_ST: Tensor
    values_ST: Tensor
    advantages_ST: Tensor
    returns_ST: Tensor
    metrics: Mapping[str, float]


@dataclass(eq=False)
class Unfinished:
    """A step whose update is not finished: `taken` of its minibatches have moved the weights. `sums` (P, M) float64 is
    what P processes have summed up over them for M metrics, `norm` the largest of their gradients' norms. `shown` are
    rows for samples.jsonl."""

    batch: Batch
    shown: tuple[Mapping[str, Any], ...]
    sums: Tensor
    norm: float = 0.0
    taken: int = 0

    def state(self) -> tuple[dict[str, Any], Tensors]:
        """A JSON object, and tensors, of the numbers too: JSON knows neither NaN nor infinity."""
        about, tensors = self.batch.metrics, {n: x for n, x in vars(self.batch).items() if isinstance(x, Tensor)}
        named = {"taken": self.taken, "pairs": self.batch.pairs, "shown": self.shown, "metrics": list(about)}
        numbers = torch.tensor([self.norm, *about.values()], dtype=torch.float64)
        return named, {"sums": self.sums, "numbers": numbers, **tensors}

    @classmethod
    def put_back(cls, state: Mapping[str, Any], tensors: Tensors) -> Unfinished:
        """What `state` said."""
        found = dict(tensors)
        sums, (norm, *numbers) = found.pop("sums"), found.pop("numbers").tolist()
        batch = Batch(state["pairs"], metrics=dict(zip(state["metrics"], numbers, strict=True)), **found)
        return cls(batch, tuple(state["shown"]), sums, norm, state["taken"])


def build(samples: Sequence[Sample], config: RlConfig, kl_coef: float, statistics: shaping.Scores) -> Batch:
    """Rewards, advantages and the numbers of a rollout. `statistics` (2, E): mean and deviation that scores are
    normalised by. On the CPU: it is little work, and the same in every process."""
    old_ST, reference_ST, values_ST, entropy_ST = (
        torch.nn.utils.rnn.pad_sequence([getattr(s, name) for s in samples], batch_first=True)
        for name in ("old", "reference", "values", "entropy")
    )
    lengths_S = torch.tensor([len(s.response.ids) for s in samples])
    tokens_ST = torch.arange(old_ST.shape[1])[None] < lengths_S[:, None]
    scores_S, rewards_S = _rewards(samples, config, statistics)
    ended_S = torch.tensor([s.response.ended for s in samples])
    valid_S = torch.from_numpy(np.isfinite(rewards_S)) & (ended_S | (not config.reward.mask_truncated))
    mask_ST = tokens_ST & valid_S[:, None]
    clean_S = torch.from_numpy(np.nan_to_num(rewards_S)).to(old_ST)
    advantages_ST, returns_ST = _advantages(
        config, clean_S, valid_S, mask_ST, kl_coef * (old_ST - reference_ST), values_ST
    )
    kl_S = (old_ST - reference_ST).sum(1)
    metrics = {
        "objective/kl": float(kl_S.mean()),
        "objective/entropy": float(masked_mean(entropy_ST, tokens_ST)),
        "objective/scores": _mean(scores_S),
        "objective/scores_std": float(np.nanstd(scores_S)) if np.isfinite(scores_S).any() else float("nan"),
        "objective/reward": _mean(rewards_S),
        "objective/non_score_reward": float(-kl_coef * kl_S.mean()) if config.kl.kl_in == "reward" else 0.0,
        "objective/kl_coef": kl_coef,
        "val/length": float(lengths_S.float().mean()),
        "val/num_eos_tokens": float(ended_S.sum()),
        "val/truncated": float((~ended_S).float().mean()),
        "val/used": float(valid_S.float().mean()),
        "val/distinct_1": distinct(samples, 1),
        "val/distinct_2": distinct(samples, 2),
        "val/sampling_error": _sampling_error(samples),
        "val/advantage_std": float(masked_var(advantages_ST, mask_ST).sqrt()),
    }
    metrics["objective/rlhf_reward"] = metrics["objective/reward"] + metrics["objective/non_score_reward"]
    if config.algorithm.algo == "ppo":
        metrics["val/explained_variance"] = float(explained_variance(values_ST, returns_ST, mask_ST))
    if len(samples[0].scores) > 1:
        metrics["objective/scores_disagreement"] = _mean(np.stack([s.scores for s in samples]).std(1, ddof=1))
    pairs = [sample.pair for sample in samples]
    return Batch(pairs, mask_ST, old_ST, reference_ST, values_ST, advantages_ST, returns_ST, metrics)


def distinct(samples: Sequence[Sample], n: int) -> float:
    """Share of different n-grams of tokens among all of the batch's (distinct-n, Li et al. 1510.03055): it falls when a
    policy repeats itself."""
    grams = [s.response.ids[i : i + n] for s in samples for i in range(len(s.response.ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def _rewards(samples: Sequence[Sample], config: RlConfig, statistics: shaping.Scores) -> tuple[shaping.Scores, ...]:
    """Raw scores, the mean of the endpoints, and rewards; (S,) both, NaN where there is none."""
    settings = config.reward
    raw_ES = np.stack([s.scores for s in samples], 1)
    baseline_ES = np.stack([s.baseline for s in samples], 1)
    normal_ES = (raw_ES - baseline_ES - statistics[0][:, None]) / statistics[1][:, None]
    combined_S = shaping.combine(normal_ES, settings.uncertainty, worst=settings.worst_case)
    rewards_S = shaping.clip(combined_S, settings.score_clip)
    ended_S = np.array([s.response.ended for s in samples])
    rewards_S = shaping.without_end(rewards_S, ended_S, settings.missing_eos_penalty)
    lengths_S = np.array([len(s.response.ids) for s in samples])
    limit, ramp = config.rollout.max_new_tokens, settings.length_ramp
    return raw_ES.mean(0), rewards_S - shaping.length_ramp(lengths_S, limit, ramp, settings.length_penalty)


def _advantages(
    config: RlConfig, rewards_S: Tensor, valid_S: Tensor, mask_ST: Tensor, penalty_ST: Tensor, values_ST: Tensor
) -> tuple[Tensor, Tensor]:
    """Advantages and, for the value function, returns; (S, T) both."""
    settings, group = config.algorithm, config.rollout.group_size or 1
    if config.kl.kl_in == "loss":
        penalty_ST = torch.zeros_like(penalty_ST)
    nothing_ST = torch.zeros_like(values_ST)
    if settings.algo == "ppo":
        rewards_ST = advantages.token_rewards(rewards_S, penalty_ST, mask_ST)
        if settings.whiten_rewards:
            rewards_ST = whiten(rewards_ST, mask_ST, shift_mean=False)
        found_ST, returns_ST = advantages.gae(rewards_ST, values_ST, mask_ST, gamma=settings.gamma, lam=settings.lam)
        return whiten(found_ST, mask_ST), returns_ST
    if settings.algo == "reinforce++":
        if settings.baseline:
            rewards_S = advantages.centred_scores(rewards_S, valid_S, group)
        rewards_ST = advantages.token_rewards(rewards_S, penalty_ST, mask_ST)
        return advantages.reinforce_plus_plus(rewards_ST, mask_ST, gamma=settings.gamma), nothing_ST
    whole_S = rewards_S - torch.where(mask_ST, penalty_ST, 0.0).sum(1)
    if settings.algo == "grpo":
        found_S = advantages.grpo(whole_S, valid_S, group, scale=settings.scale_rewards)
    else:
        found_S = advantages.rloo(whole_S, valid_S, group)
    return torch.where(mask_ST, found_S[:, None], 0.0), nothing_ST


def _sampling_error(samples: Sequence[Sample]) -> float:
    """The largest difference between a token's log-probability when it was sampled and by the update's forward."""
    pairs = [(s.old, torch.tensor(s.response.logprobs)) for s in samples if s.response.ids]
    return max((float((old - sampled).abs().max()) for old, sampled in pairs), default=0.0)


def _mean(x: shaping.Scores) -> float:
    return float(np.nanmean(x)) if np.isfinite(x).any() else float("nan")
