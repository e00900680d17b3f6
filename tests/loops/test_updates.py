"""Each algorithm's whole step against a second implementation: from the sampled ids and their scores to the weights.

The reference is written out here, sample by sample and token by token: forward passes of the same network in float64,
one sequence at a time without padding; rewards, advantages and losses in plain Python over float64 scalars; gradients
of that; clipping and AdamW by hand. The product runs as it does for a user: float32, padded, in micro-batches.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from plaudit import _trees as trees
from plaudit_loops import batch as batches
from plaudit_loops import config as configs
from plaudit_loops import data
from plaudit_loops.collect import Sample
from plaudit_loops.config import DpoConfig, OptimConfig, RlConfig
from plaudit_loops.data import Encoded
from plaudit_loops.dpo import Dpo
from plaudit_loops.masked import masked_mean, masked_var
from plaudit_loops.optim import Trainable
from plaudit_loops.policy import Policy, ValueHead
from plaudit_loops.rl import Rl
from plaudit_loops.world import World
from plaudit_model.interrupt import StopRequest
from plaudit_model.optimiser import set_rate

CLOSE = 1e-6
OPTIM: dict[str, Any] = {
    "optim.learning_rate": 4e-3, "optim.max_grad_norm": 0.05, "optim.weight_decay": 0.1, "optim.adam_epsilon": 1e-3,
    "optim.micro_batch": 5, "run.seed": 3, "run.report_to": [],
}  # fmt: skip
RL = OPTIM | {
    "rollout.max_new_tokens": 6, "rollout.prompts_per_step": 4, "rollout.group_size": 4, "rollout.temperature": 0.8,
    "algorithm.minibatches": 2, "algorithm.ppo_epochs": 2, "algorithm.clip_low": 0.02, "algorithm.clip_high": 0.03,
    "algorithm.value_clip": 0.1, "algorithm.value_warmup_steps": 1, "algorithm.value_learning_rate": 2e-3,
    "algorithm.entropy_coef": 0.01, "kl.kl_coef": 0.2, "reward.missing_eos_penalty": 0.7, "reward.score_clip": 2.0,
    "algorithm.gamma": 0.98,
}  # fmt: skip
ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"algorithm.whiten_rewards": True},
    "grpo": {"algorithm.dual_clip": 3.0},
    "rloo": {"kl.kl_in": "loss", "kl.kl_estimator": "k2", "algorithm.loss_aggregation": "constant"},
    "reinforce++": {"algorithm.baseline": True},
}


def pays(text: str) -> float | None:
    """Some letters are worth something; a response that begins with an h cannot be scored."""
    return None if text.startswith("h") else text.count("c") - 0.3 * len(text) + 0.5 * text.startswith("b")


@pytest.fixture
def policy(opinionated: Callable[[float], Policy]) -> Policy:
    return opinionated(4)


def moved(module: nn.Module, seed: int) -> None:
    """Away from where it was, so that no difference to the reference policy is zero."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))


def rl_stage(policy: Policy, prompts: Path, computed: Any, algo: str, **changes: Any) -> tuple[Rl, RlConfig]:
    values = {"rollout.prompts": [str(prompts)], "algorithm.algo": algo} | RL | ALGORITHMS[algo] | changes
    config = configs.resolved(trees.changed(RlConfig(), values))
    value = ValueHead(policy.hidden_size)
    modules = {"policy": policy.module} | ({"value": value} if algo == "ppo" else {})
    rates = {"policy": config.optim.learning_rate, "value": config.algorithm.value_learning_rate}
    trainable = Trainable(modules, rates, config.optim, World("cpu"))  # type: ignore[arg-type]
    rows, _ = data.encode(data.prompt_rows([str(prompts)], 0, 0), policy, max_length=64)
    stage = Rl(policy, value, trainable, rows, computed(pays), config)
    moved(policy.module, 1)
    moved(value, 2)
    return stage, config


# -- the second implementation -----------------------------------------------------------------------------------


class Network:
    """A policy and a value head in float64, asked about one sequence at a time."""

    def __init__(self, module: nn.Module, head: nn.Module | None, temperature: float) -> None:
        self.module, self.temperature = copy.deepcopy(module).double(), temperature
        self.head = copy.deepcopy(head).double() if head is not None else None

    def __call__(self, prompt: Any, response: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Log-probability, entropy and value (of the state before it) of each token of the response."""
        ids = torch.tensor([[*prompt, *response]])
        out = self.module(input_ids=ids, output_hidden_states=True)
        logprobs, entropies, values = [], [], []
        for t, token in enumerate(response, len(prompt)):
            logits = out.logits[0, t - 1] / self.temperature
            logps = logits - torch.logsumexp(logits, 0)
            logprobs.append(logps[token])
            entropies.append(-sum(p * p.log() for p in logps.exp()))
            state = out.hidden_states[-1][0, t - 1]
            values.append(self.head.linear(state)[0] if self.head else logps[token] * 0)  # type: ignore[operator, union-attr]
        return logprobs, entropies, values

    def named(self) -> dict[str, nn.Parameter]:
        found = {f"policy.{name}": p for name, p in self.module.named_parameters()}
        return found | ({f"value.{n}": p for n, p in self.head.named_parameters()} if self.head else {})


class Adam:
    """AdamW (Loshchilov and Hutter 1711.05101) after clipping to a global norm, one parameter at a time."""

    def __init__(self, network: Network, config: OptimConfig, rates: dict[str, float]) -> None:
        self.network, self.config, self.rates = network, config, rates
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}
        self.norm, self.clipped, self.tokens = 0.0, 0, 0  # the largest norm, and what was clipped of how many tokens

    def step(self, loss: Tensor, only: str = "") -> None:
        c, named = self.config, {n: p for n, p in self.network.named().items() if n.startswith(only)}
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        norm = math.sqrt(sum(float((g**2).sum()) for g in found if g is not None))
        self.norm, shrink = max(self.norm, norm), min(1.0, c.max_grad_norm / (norm + 1e-6))
        for (name, parameter), gradient in zip(named.items(), found, strict=True):
            if gradient is None:
                continue
            g, rate, t = gradient * shrink, self.rates[name.partition(".")[0]], self.steps.get(name, 0) + 1
            m = c.adam_beta1 * self.first.get(name, 0.0) + (1 - c.adam_beta1) * g
            v = c.adam_beta2 * self.second.get(name, 0.0) + (1 - c.adam_beta2) * g**2
            self.first[name], self.second[name], self.steps[name] = m, v, t
            unbiased, scale = m / (1 - c.adam_beta1**t), (v / (1 - c.adam_beta2**t)).sqrt() + c.adam_epsilon
            decay = rate * c.weight_decay if parameter.ndim > 1 and "norm" not in name else 0.0
            parameter.data = parameter.data * (1 - decay) - rate * unbiased / scale


def whitened(rows: list[list[float]], shift: bool = True) -> list[list[float]]:
    every = [x for row in rows for x in row]
    mean = sum(every) / len(every)
    std = math.sqrt(sum((x - mean) ** 2 for x in every) / len(every) + 1e-8)
    return [[(x - mean) / std + (0.0 if shift else mean) for x in row] for row in rows]


def following(row: list[float], gamma: float) -> list[float]:
    """Discounted sums of what is to come."""
    return [sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))]


def advantages(
    config: RlConfig, rewards: list[float | None], kls: list[list[float]], values: list[list[float]]
) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and returns of each token; nothing for a sample without a reward."""
    a, group, beta = config.algorithm, config.rollout.group_size or 1, float(config.kl.kl_coef or 0)
    if config.kl.kl_in == "loss":
        beta = 0.0
    used = [i for i, reward in enumerate(rewards) if reward is not None]
    mates = [[j for j in used if j // group == i // group] for i in range(len(rewards))]
    reward = {i: float(rewards[i]) for i in used}  # type: ignore[arg-type]
    if a.algo in ("grpo", "rloo"):
        whole = {i: reward[i] - beta * sum(kls[i]) for i in used}
        found: list[list[float]] = [[] for _ in rewards]
        for i in used:
            own = [whole[j] for j in mates[i]]
            mean = sum(own) / len(own)
            std = math.sqrt(sum((x - mean) ** 2 for x in own) / max(len(own) - 1, 1))
            others = [whole[j] for j in mates[i] if j != i]
            gain = (whole[i] - mean) / (std + 1e-4) if a.algo == "grpo" else whole[i] - sum(others) / len(others)
            found[i] = [gain] * len(kls[i])
        return found, [[] for _ in rewards]
    if a.algo == "reinforce++":
        reward = {i: r - sum(reward[j] for j in mates[i]) / len(mates[i]) for i, r in reward.items()}
    dense = {i: [-beta * kl for kl in kls[i][:-1]] + [reward[i] - beta * kls[i][-1]] for i in used}
    if a.algo == "reinforce++":
        return spread(used, whitened([following(dense[i], a.gamma) for i in used]), len(rewards)), [[] for _ in rewards]
    dense = dict(zip(used, whitened([dense[i] for i in used], shift=False), strict=True))
    raw = []
    for i in used:
        after = [*values[i][1:], 0.0]
        raw.append(following([r + a.gamma * w - v for r, v, w in zip(dense[i], values[i], after, strict=True)],
                             a.gamma * a.lam))  # fmt: skip
    returns = [[x + v for x, v in zip(row, values[i], strict=True)] for i, row in zip(used, raw, strict=True)]
    return spread(used, whitened(raw), len(rewards)), spread(used, returns, len(rewards))


def spread(used: list[int], rows: list[list[float]], count: int) -> list[list[float]]:
    by = dict(zip(used, rows, strict=True))
    return [by.get(i, []) for i in range(count)]


def shaped(samples: list[Sample], config: RlConfig) -> list[float | None]:
    limit, rewards = config.reward.score_clip, list[float | None]()
    for sample in samples:
        score = min(max(float(sample.scores[0]), -limit), limit)
        score -= 0 if sample.response.ended else config.reward.missing_eos_penalty
        rewards.append(None if math.isnan(sample.scores[0]) else score)
    return rewards


def losses_of(
    config: RlConfig, network: Network, sample: Sample, old: list[float], ref: list[float], gain: list[float],
    goal: list[float], before: list[float],
) -> tuple[list[Tensor], list[Tensor], int]:  # fmt: skip
    """The actor's and the critic's loss of each token, and how many tokens of the actor are clipped."""
    a, actor, critic, clipped = config.algorithm, [], [], 0
    logprobs, entropies, values = network(*sample.pair)
    for t, logprob in enumerate(logprobs):
        ratio, x = (logprob - old[t]).exp(), gain[t]
        near = 1 + a.clip_high if ratio > 1 + a.clip_high else 1 - a.clip_low if ratio < 1 - a.clip_low else ratio
        loss = -x * ratio if -x * ratio >= -x * near else -x * near
        clipped += bool(-x * near > -x * ratio)
        if a.dual_clip and x < 0 and loss > -x * a.dual_clip:
            loss = torch.tensor(-x * a.dual_clip, dtype=torch.float64)
        if config.kl.kl_in == "loss":
            d = logprob - ref[t]
            kl = d**2 / 2 if config.kl.kl_estimator == "k2" else (-d).exp() - 1 + d
            loss = loss + float(config.kl.kl_coef or 0) * kl
        actor.append(loss - a.entropy_coef * entropies[t])
        if a.algo == "ppo":
            kept = min(max(values[t], before[t] - a.value_clip), before[t] + a.value_clip)
            critic.append(0.5 * max((values[t] - goal[t]) ** 2, (kept - goal[t]) ** 2))
    return actor, critic, clipped


def aggregated(config: RlConfig, actors: list[list[Tensor]]) -> Tensor:
    total: Any = sum(map(sum, actors))
    if config.algorithm.loss_aggregation == "sequence":
        total = sum(sum(actor) / len(actor) for actor in actors)
    lengths = {
        "token": sum(map(len, actors)), "sequence": len(actors),
        "constant": len(actors) * config.rollout.max_new_tokens,
    }  # fmt: skip
    return total / lengths[config.algorithm.loss_aggregation or ""]  # type: ignore[no-any-return]


def reference_step(config: RlConfig, samples: list[Sample], now: Network, then: Network, *, warming: bool) -> Adam:
    """All optimiser steps of one step of the loop."""
    a = config.algorithm
    rates = {"policy": float(config.optim.learning_rate or 0), "value": a.value_learning_rate}
    adam = Adam(now, config.optim, rates)
    said = [now(*s.pair) for s in samples]
    old, values = ([[x.item() for x in one[part]] for one in said] for part in (0, 2))
    ref = [[x.item() for x in then(*s.pair)[0]] for s in samples]
    kls = [[x - y for x, y in zip(p, q, strict=True)] for p, q in zip(old, ref, strict=True)]
    gains, goals = advantages(config, shaped(samples, config), kls, values)
    for epoch in range(a.ppo_epochs or 1):
        order = np.random.default_rng([config.run.seed, 1, epoch]).permutation(len(samples))
        size = math.ceil(len(samples) / a.minibatches)
        for start in range(0, len(samples), size):
            part = [int(i) for i in order[start : start + size] if gains[i]]
            found = [losses_of(config, now, samples[i], old[i], ref[i], gains[i], goals[i], values[i]) for i in part]
            adam.clipped += sum(clipped for *_, clipped in found)
            tokens = sum(len(actor) for actor, *_ in found)
            adam.tokens += tokens
            critic: Any = sum(sum(c) for _, c, _ in found) / tokens
            if warming:
                adam.step(critic, only="value")
                continue
            loss = aggregated(config, [actor for actor, *_ in found])
            adam.step(loss + (a.vf_coef * critic if a.algo == "ppo" else 0.0))
    return adam


# -- the product beside it -----------------------------------------------------------------------------------------


def assert_the_same_weights(trainable: Trainable, adam: Adam) -> None:
    before = {name: p.detach() for name, p in trainable.named()}
    expected = adam.network.named()
    assert set(before) == set(expected)
    for name, parameter in before.items():
        gap = (parameter.double() - expected[name]).abs().max().item()
        assert gap <= CLOSE, (name, gap)


def collected(stage: Rl, config: RlConfig) -> list[Sample]:
    """The samples of the first step: a function of the seed, so that `take` collects the same ones again."""
    chosen = data.members(4, config.rollout.prompts_per_step, config.run.seed, 0)
    return stage._collector.collect(0, chosen, StopRequest())


@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_a_step_of_reinforcement_learning(algo: str, policy: Policy, prompts: Path, computed: Any) -> None:
    """Four clipped AdamW steps: two passes over sixteen responses in two minibatches."""
    then = Network(policy.module, None, 0.8)
    stage, config = rl_stage(policy, prompts, computed, algo, **{"algorithm.value_warmup_steps": 0})
    now = Network(policy.module, stage._values if algo == "ppo" else None, 0.8)
    samples = collected(stage, config)
    assert any(math.isnan(s.scores[0]) for s in samples) and {s.response.ended for s in samples} == {True, False}
    set_rate(stage.trainable.optimizer, 1.0)
    done = stage.take(0, StopRequest())
    adam = reference_step(config, samples, now, then, warming=False)
    assert_the_same_weights(stage.trainable, adam)
    assert done.values["grad_norm"] == pytest.approx(adam.norm, rel=1e-5)
    assert adam.norm > config.optim.max_grad_norm, "gradients are clipped"
    assert done.values["policy/clipfrac_avg"] == pytest.approx(adam.clipped / adam.tokens, abs=1e-9)
    assert adam.clipped > 0, "so are ratios"


def test_a_warm_up_step_moves_the_value_head_alone(policy: Policy, prompts: Path, computed: Any) -> None:
    then = Network(policy.module, None, 0.8)
    stage, config = rl_stage(policy, prompts, computed, "ppo")
    now, before = Network(policy.module, stage._values, 0.8), stage.trainable.weights()
    samples = collected(stage, config)
    set_rate(stage.trainable.optimizer, 1.0)
    done = stage.take(0, StopRequest())
    adam = reference_step(config, samples, now, then, warming=True)
    assert_the_same_weights(stage.trainable, adam)
    assert done.values["grad_norm"] == pytest.approx(adam.norm, rel=1e-5)
    same = {name for name, tensor in stage.trainable.weights().items() if torch.equal(tensor, before[name])}
    assert {*before} - same == {"value.linear.weight", "value.linear.bias"}


@pytest.mark.parametrize("algo", ["ppo", "reinforce++"])
def test_whitened_advantages_have_mean_0(algo: str, policy: Policy, prompts: Path, computed: Any) -> None:
    stage, config = rl_stage(policy, prompts, computed, algo)
    built = batches.build(collected(stage, config), config, 0.2, np.array([[0.0], [1.0]]))
    assert float(masked_mean(built.advantages_ST, built.mask_ST)) == pytest.approx(0, abs=1e-6)
    assert float(masked_var(built.advantages_ST, built.mask_ST)) == pytest.approx(1, abs=1e-5)
    assert not built.advantages_ST[~built.mask_ST].any()


def test_a_step_of_dpo(policy: Policy) -> None:
    values = OPTIM | {"data": ["pairs"], "batch_size": 3, "beta": 0.4, "label_smoothing": 0.1}
    config = trees.changed(DpoConfig(), values | {"optim.micro_batch": 2})
    rows = [Encoded(p, tuple(policy.encode_prompt(p)), responses) for p, responses in (
        ("a b", ((4, 4, 1), (5, 1))), ("c", ((3, 1), (2, 6, 7, 1))), ("d e f", ((9, 1), (8, 8, 8, 8, 1))),
    )]  # fmt: skip
    then = Network(policy.module, None, 1.0)
    trainable = Trainable({"policy": policy.module}, {"policy": 4e-3}, config.optim, World("cpu"))
    stage = Dpo(policy, trainable, rows, config)
    moved(policy.module, 1)
    now = Network(policy.module, None, 1.0)
    set_rate(trainable.optimizer, 1.0)
    done = stage.take(0, StopRequest())
    losses: Any = []
    for row in rows:
        gaps = [sum(now(row.prompt_ids, r)[0]) - sum(then(row.prompt_ids, r)[0]).item() for r in row.responses]
        right = 1 / (1 + (-config.beta * (gaps[0] - gaps[1])).exp())
        losses.append(-0.9 * right.log() - 0.1 * (1 - right).log())
    adam = Adam(now, config.optim, {"policy": 4e-3})
    adam.step(sum(losses) / 3)
    assert_the_same_weights(trainable, adam)
    assert done.values["loss"] == pytest.approx(sum(losses).item() / 3, abs=CLOSE)
    assert done.values["grad_norm"] == pytest.approx(adam.norm, rel=1e-5) and adam.norm > config.optim.max_grad_norm
