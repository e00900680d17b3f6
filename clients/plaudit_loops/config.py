"""The configurations of the three verbs: frozen dataclasses. A field's sentence is its help on the command line, and
every field is an option there (`plaudit._options`), so its name is unique within a configuration.

Names are TRL's where TRL has one. None means "resolved when the run starts"; the `run.toml` that a run leaves holds
the resolved value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from plaudit._trees import check_ranges, option
from plaudit.errors import ConfigurationError
from plaudit_model.adam import AdamConfig

Algorithm = Literal["ppo", "grpo", "rloo", "reinforce++"]


@dataclass(frozen=True)
class PolicyConfig:
    """What is trained, and where."""

    policy: str = option("", "directory of the policy to start from, a causal language model")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "of the forward pass; weights and optimiser are fp32. auto: bfloat16 on CUDA, float32 on CPU"
    )
    device: str = option("auto", "cpu, cuda, cuda:1...; auto: cuda if there is one")
    lora_r: int = option(0, "rank of a LoRA adapter, trained instead of the weights (needs peft); 0: none", low=0)
    lora_alpha: float = option(32.0, "scale of the adapter", low=0)


@dataclass(frozen=True)
class OptimConfig(AdamConfig):
    """AdamW, its schedule, and the size of a forward pass."""

    learning_rate: float | None = option(
        None, "peak learning rate; default by the policy's size and the verb", low=0, high=1
    )
    min_lr_ratio: float = option(0.0, "where its linear decay ends, as a share of the peak", low=0, high=1)
    adam_epsilon: float = option(1e-5, "AdamW; larger than usual, as in PPO: gradients are small late", low=0, high=1)
    micro_batch: int = option(32, "sequences in one forward pass: memory and speed, not the result", low=1)
    max_skipped: int = option(5, "updates skipped in a row as a gradient is not finite; one more stops the run", low=0,
                              changes=True)  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """What is recorded, and what survives a kill."""

    seed: int = option(0, "of the sampling, the order of the data and fresh weights", low=0, high=2**63 - 1)
    report_to: tuple[str, ...] = option(
        ("tensorboard",), "trackers besides metrics.jsonl, as accelerate names them: tensorboard, wandb, mlflow...",
        changes=True,
    )  # fmt: skip
    checkpoint_every: int = option(
        0, "save every so many steps; 0: as often as keeps saving under 2% of the time", low=0, changes=True
    )
    keep: int = option(2, "checkpoints kept; at least 2: a damaged one needs a predecessor", low=2, changes=True)


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning."""

    data: tuple[str, ...] = option(
        (), "JSONL files with prompt and response (or completion), or messages; `starter`: the built-in tasks"
    )
    starter_records: int = option(6000, "how many rows the built-in tasks give", low=1)
    epochs: int = option(1, "passes over the data", low=1)
    batch_size: int = option(32, "rows in an optimiser step", low=1)
    max_length: int = option(1024, "tokens of prompt and response; longer rows are left out, and counted", low=2)
    model: PolicyConfig = PolicyConfig(policy="starter")
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimisation."""

    data: tuple[str, ...] = option((), "JSONL files with prompt, chosen and rejected")
    epochs: int = option(1, "passes over the pairs", low=1)
    batch_size: int = option(32, "pairs in an optimiser step", low=1)
    max_length: int = option(1024, "tokens of prompt and response; longer pairs are left out, and counted", low=2)
    beta: float = option(0.1, "how dear it is to leave the reference; larger stays closer", low=0)
    label_smoothing: float = option(0.0, "probability that a label is wrong (conservative DPO)", low=0, high=0.5)
    model: PolicyConfig = PolicyConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class RolloutConfig:
    """What is sampled."""

    prompts: tuple[str, ...] = option(
        ("starter",), "JSONL files with prompt or messages; `starter`: the built-in tasks"
    )
    starter_prompts: int = option(2000, "how many prompts the built-in tasks give", low=1)
    max_prompt_tokens: int = option(512, "prompts with more are left out, and counted", low=1)
    max_new_tokens: int = option(64, "tokens of a response; one that has not ended by then is truncated", low=1)
    temperature: float = option(1.0, "of sampling and of every log-probability; nothing else shapes sampling", low=0.01)
    prompts_per_step: int = option(32, "prompts in a step, over all processes", low=1)
    group_size: int | None = option(None, "responses to a prompt; default 1 for ppo and reinforce++, 8 for grpo, 4 for "
                                    "rloo", low=1)  # fmt: skip
    rollout_batch: int = option(64, "responses generated at once; scored while the next are generated", low=1)


@dataclass(frozen=True)
class RewardConfig:
    """Where scores come from, and what becomes of them."""

    url: tuple[str, ...] = option(
        (), "of the served reward model, default $PLAUDIT_URL; several: an ensemble, combined in here", changes=True
    )
    uncertainty: float = option(0.0, "with several endpoints: mean - this x standard deviation", low=0)
    worst_case: bool = option(False, "with several endpoints: the lowest of their scores, in place of the mean")
    reward_model: str | None = option(None, "model to ask for, where a server has several")
    pin: bool = option(True, "hold the revision that answers first: if it changes, the run stops; else it is logged")
    on_error: Literal["raise", "none"] = option(
        "raise", "a response that cannot be scored: stop with a checkpoint, or leave it out, counted", changes=True
    )
    max_failed: float = option(0.5, "share of a step's responses without a score that stops the run all the same",
                               low=0, high=1, changes=True)  # fmt: skip
    timeout: float = option(600.0, "seconds, with retries, until a score is given up; 0: never", low=0, changes=True)
    attempt_timeout: float = option(0.0, "seconds for one attempt of it; 0: automatic", low=0, changes=True)
    overlong: Literal["error", "truncate_prompt", "truncate_left"] = option(
        "error", "what the server does with more tokens than its model takes"
    )
    normalize: Literal["none", "reference", "prompt"] = option(
        "none", "subtract what the starting policy scores: `reference` over all prompts, and divide by its deviation; "
        "`prompt` on the same prompt",
    )  # fmt: skip
    reference_samples: int = option(
        4, "for `prompt`: responses of the starting policy to a prompt; for `reference`: steps of them", low=1
    )
    score_clip: float = option(0.0, "rewards are kept within +- this, after normalising; 0: they are not", low=0)
    missing_eos_penalty: float = option(1.0, "taken off a truncated response", low=0)
    mask_truncated: bool = option(False, "leave truncated responses out of the update instead (DAPO)")
    length_ramp: int = option(0, "tokens before the limit from where on length costs (DAPO); 0: it does not", low=0)
    length_penalty: float = option(1.0, "what it costs at the limit", low=0)


@dataclass(frozen=True)
class KlConfig:
    """How far from the starting policy. KL is in nats per response: summed over tokens, the mean over responses."""

    kl_coef: float | None = option(None, "its weight; default 0.05 in the reward, 0.04 in grpo's loss", low=0)
    kl_estimator: Literal["k1", "k2", "k3"] | None = option(None, "default k1 in the reward, k3 in the loss")
    kl_in: Literal["reward", "loss"] | None = option(None, "default reward; loss for grpo")
    kl_target: float = option(0.0, "adapt the weight so that KL comes to this (Ziegler et al.); 0: fixed", low=0)
    kl_horizon: int = option(10_000, "responses over which it adapts", low=1)
    kl_budget: float = option(0.0, "the run stops when KL exceeds this, with the last policy within; 0: never", low=0)


@dataclass(frozen=True)
class AlgorithmConfig:
    """From rewards to gradients."""

    algo: Algorithm = option("ppo", "where advantages come from: a value function, or the other responses")
    ppo_epochs: int | None = option(None, "passes over a step's responses; default 4 for ppo, else 1", low=1)
    minibatches: int = option(4, "optimiser steps in a pass", low=1)
    gamma: float = option(1.0, "discount", low=0, high=1)
    lam: float = option(0.95, "of generalised advantage estimation", low=0, high=1)
    clip_low: float = option(0.2, "the ratio's clip below 1", low=0, high=1)
    clip_high: float = option(0.2, "and above", low=0)
    dual_clip: float = option(0.0, "bound of the loss on bad tokens, as a ratio (3 is usual); 0: none", low=0)
    value_clip: float = option(0.2, "values move at most this far in a step", low=0)
    vf_coef: float = option(0.1, "weight of the value loss", low=0)
    value_learning_rate: float = option(1e-3, "of the value head, which begins at 0", low=0, high=1)
    value_warmup_steps: int = option(5, "first steps, in which the value head alone learns", low=0)
    entropy_coef: float = option(0.0, "weight of an entropy bonus", low=0)
    whiten_rewards: bool = option(False, "scale rewards to variance 1 before advantages (ppo)")
    scale_rewards: bool = option(True, "grpo: divide by the group's deviation; without: Dr. GRPO")
    baseline: bool = option(False, "reinforce++: subtract the group's mean before whitening")
    loss_aggregation: Literal["token", "sequence", "constant"] | None = option(
        None, "mean over tokens, of sequences' means, or Dr. GRPO's constant; default sequence for grpo, else token"
    )


@dataclass(frozen=True)
class RlConfig:
    """Reinforcement learning from a served reward model."""

    steps: int = option(200, "steps: rollout, scores, update", low=1)
    sample_every: int = option(10, "write some responses to samples.jsonl every so many steps", low=1, changes=True)
    samples: int = option(4, "how many", low=0, changes=True)
    model: PolicyConfig = PolicyConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    kl: KlConfig = KlConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        check_ranges(self)
        group, responses = self.rollout.group_size, self.rollout.prompts_per_step * (self.rollout.group_size or 1)
        if group == 1 and (self.algorithm.algo in ("grpo", "rloo") or self.algorithm.baseline):
            raise ConfigurationError(
                "rollout.group_size must be at least 2: a response is compared with the others of its prompt"
            )
        if self.algorithm.minibatches > responses:
            raise ConfigurationError(f"a step has {responses} responses, fewer than algorithm.minibatches")
        if self.reward.length_ramp > self.rollout.max_new_tokens:
            raise ConfigurationError("reward.length_ramp is longer than rollout.max_new_tokens")
        if self.kl.kl_target and self.kl.kl_coef == 0:
            raise ConfigurationError(
                "kl.kl_target adapts kl.kl_coef by a factor, and that is 0: name a kl_coef above 0, or "
                "set kl_target = 0, which computes the same"
            )
        if self.kl.kl_in == "reward" and self.kl.kl_estimator in ("k2", "k3"):
            raise ConfigurationError("kl.kl_estimator in the reward must be k1: the others have another gradient there")
        if self.kl.kl_in == "loss" and self.kl.kl_estimator == "k1" and self.kl.kl_coef != 0:
            raise ConfigurationError(
                "kl.kl_estimator in the loss must be k2 or k3: the gradient of k1 is 0 in the mean there"
            )


Config = SftConfig | DpoConfig | RlConfig


def resolved(config: RlConfig) -> RlConfig:
    """The configuration with what depends on the algorithm filled in. Raises ConfigurationError."""
    algo = config.algorithm.algo
    place = config.kl.kl_in or ("loss" if algo == "grpo" else "reward")
    choices: Mapping[str, Mapping[str, Any]] = {
        "rollout": {"group_size": _group_size(config.algorithm)},
        "kl": {"kl_in": place, "kl_estimator": "k3" if place == "loss" else "k1",
               "kl_coef": 0.04 if place == "loss" else 0.05},
        "algorithm": {"ppo_epochs": 4 if algo == "ppo" else 1,
                      "loss_aggregation": "sequence" if algo == "grpo" else "token"},
    }  # fmt: skip
    for section, values in choices.items():
        part = getattr(config, section)
        missing = {name: value for name, value in values.items() if getattr(part, name) is None}
        config = dataclasses.replace(config, **{section: dataclasses.replace(part, **missing)})
    return config


def _group_size(algorithm: AlgorithmConfig) -> int:
    return {"grpo": 8, "rloo": 4}.get(algorithm.algo, 4 if algorithm.baseline else 1)


def recipe(config: Config) -> dict[str, Any]:
    """What was measured (docs/loops.md) where all data is the built-in tasks, by dotted path."""
    if isinstance(config, SftConfig) and config.data == ("starter",):
        return {"starter_records": 13_000, "epochs": 2, "batch_size": 16}
    if not isinstance(config, RlConfig) or config.rollout.prompts != ("starter",):
        return {}
    group = config.rollout.group_size or min(_group_size(config.algorithm), 4)
    return {
        "steps": 60, "rollout.starter_prompts": 12_000, "rollout.prompts_per_step": max(1, 64 // group),
        "rollout.group_size": group, "reward.normalize": "reference", "reward.score_clip": 5.0,
        "kl.kl_in": "reward", "kl.kl_budget": 8.0,
        "algorithm.ppo_epochs": 2, "algorithm.minibatches": 2,
    }  # fmt: skip


def learning_rate(verb: Literal["sft", "rl", "dpo"], parameters: int) -> float:
    """A peak learning rate for a policy of this size: small ones need large ones. The last is measured, on the
    starter's policy of a million parameters (docs/loops.md)."""
    rates = {"sft": (1e-5, 5e-5, 2e-4, 1e-3, 4e-3), "rl": (1e-6, 5e-6, 3e-5, 1e-4, 5e-4),
             "dpo": (5e-7, 5e-6, 3e-5, 1e-4, 2e-4)}[verb]  # fmt: skip
    return rates[sum(parameters < size for size in (10**9, 10**8, 2 * 10**7, 2 * 10**6))]
