"""The three verbs, from their configuration to a policy on disk."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from plaudit import ConfigurationError
from plaudit._extras import install
from plaudit_model import checkpoint
from plaudit_model.run_folder import RunExists
from plaudit_model.store import atomic_directory, weights_identity

from . import config as configs
from . import data, loop, starter
from .config import DpoConfig, PolicyConfig, RlConfig, SftConfig
from .dpo import Dpo
from .optim import Trainable
from .policy import Policy, ValueHead, load_policy
from .rl import Rl
from .scoring import Rewards, Served
from .sft import Sft
from .world import World

LOG = logging.getLogger("plaudit.loops")
Verb = Literal["sft", "rl", "dpo"]


def sft(config: SftConfig, out: Path, console: Console) -> None:
    """Supervised fine-tuning into `out`. Raises as `rl`."""
    with loop.opened(out, console, config.model.device) as place:
        policy = _policy(config.model, config.run.seed, place.world, out, kept=bool(config.model.lora_r))
        config, trainable = _ready(config, "sft", policy, place, {})
        rows = _encoded(data.sft_rows(config.data, config.starter_records, config.run.seed), policy,
                        config.max_length, place)  # fmt: skip
        loop.run(Sft(policy, trainable, rows, config), config, place)


def dpo(config: DpoConfig, out: Path, console: Console) -> None:
    """Direct preference optimisation into `out`. Raises as `rl`."""
    with loop.opened(out, console, config.model.device) as place:
        policy = _policy(config.model, config.run.seed, place.world, out)
        config, trainable = _ready(config, "dpo", policy, place, {})
        rows = _encoded(data.pair_rows(config.data), policy, config.max_length, place)
        loop.run(Dpo(policy, trainable, rows, config), config, place)


def rl(config: RlConfig, out: Path, console: Console, rewards: Rewards | None = None) -> None:
    """Reinforcement learning into `out`, against the served reward model of the configuration, or another source of
    `rewards`. Raises RunExists, NotWritten, Diverged, PeerFailed, ModelError, PlauditError."""
    config = configs.resolved(config)
    with loop.opened(out, console, config.model.device) as place:
        source = rewards or _served(config, place)
        try:
            policy = _policy(config.model, config.run.seed, place.world, out)
            values = ValueHead(policy.hidden_size).to(policy.device)
            extra = {"value": values} if config.algorithm.algo == "ppo" else {}
            config, trainable = _ready(config, "rl", policy, place, extra)
            settings = config.rollout
            prompts = data.prompt_rows(settings.prompts, settings.starter_prompts, config.run.seed)
            rows = _encoded(prompts, policy, settings.max_prompt_tokens, place, settings.max_new_tokens)
            if isinstance(source, Served):
                source.expect(max(len(row.prompt_ids) for row in rows) + settings.max_new_tokens)
            loop.run(Rl(policy, values, trainable, rows, source, config), config, place)
        finally:
            source.close()


def _served(config: RlConfig, place: loop.Place) -> Served:
    """A run that goes on has patience: what was reclaimed with it may be on its way back too."""
    served = Served(config.reward.url, config.reward)
    for line in served.connect(hasty=not checkpoint.steps(place.out / "checkpoints")):
        place.console.print(f"scored by {line}", soft_wrap=True)
    return served


def _policy(config: PolicyConfig, seed: int, world: World, out: Path, *, kept: bool = True) -> Policy:
    """The policy to begin with; that of `starter` is untrained, and made in `<out>/base`. `kept`: whether training goes
    on needing its weights, which are then hashed, once, beside their loading."""
    if not config.policy:
        raise ConfigurationError(
            "--policy names no directory: fit one with `plaudit sft`, or name any causal language model"
        )
    directory = Path(config.policy)
    if config.policy == starter.NAME:
        directory = out / "base"
        if world.is_main and not (directory / "config.json").exists():
            if directory.exists():
                raise RunExists(f"{directory} is there and no policy: it would be overwritten; name another --out")
            with atomic_directory(directory) as staging:
                starter.write_policy(staging, seed)
        world.any(False)  # the others wait until it is there
    device = world.device
    autocast = config.dtype == "bfloat16" or (config.dtype == "auto" and device.startswith("cuda"))
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(weights_identity, directory) if kept and world.is_main else None
        policy = load_policy(directory, device=device, autocast=autocast, seed=seed)
    found = hashing.result() if hashing else None
    if kept and (known := world.gather([found])[0]):
        policy = dataclasses.replace(policy, origin={"config.json": known["config"], **known["weights"]})
    return _with_adapter(policy, config, seed) if config.lora_r else policy


def _with_adapter(policy: Policy, config: PolicyConfig, seed: int) -> Policy:
    try:
        import peft
    except ModuleNotFoundError:
        raise ConfigurationError(f"--lora-r needs peft: {install('peft')}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = peft.LoraConfig(
            r=config.lora_r, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # between peft and transformers
            module: Any = peft.get_peft_model(policy.module, settings)
    return dataclasses.replace(policy, module=module.to(policy.device))


def _ready(config: Any, verb: Verb, policy: Policy, place: loop.Place, extra: Mapping[str, torch.nn.Module]) -> Any:
    """The configuration with its learning rate, and what is trained with it."""
    rate = config.optim.learning_rate
    if rate is None:
        rate = configs.learning_rate(verb, policy.parameters)
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=rate))
        place.console.print(f"optim.learning_rate = {rate:g}, for {policy.parameters:,} parameters", soft_wrap=True)
    rates = {"policy": rate}
    if extra:
        rates["value"] = config.algorithm.value_learning_rate
    return config, Trainable({"policy": policy.module, **extra}, rates, config.optim, place.world)


def _encoded(
    rows: list[data.Row], policy: Policy, max_length: int, place: loop.Place, more: int = 0
) -> list[data.Encoded]:
    """The rows as token ids. Raises ConfigurationError if one, with `more` tokens that are sampled, is longer than
    the policy: responses may grow that long in the middle of a run, and what is read beyond is noise, or no row of a
    table."""
    encoded, dropped = data.encode(rows, policy, max_length=max_length)
    longest = more + max(len(row.prompt_ids) + max(map(len, row.responses), default=0) for row in encoded)
    reads = getattr(policy.module.config, "max_position_embeddings", None) or longest
    if longest > reads:
        lower = "--max-new-tokens or --max-prompt-tokens" if more else "--max-length"
        said = f"a prompt and its response may have {longest} tokens, but the policy reads {reads}"
        raise ConfigurationError(f"{said}: lower {lower}")
    tokens = sum(len(row.prompt_ids) + sum(map(len, row.responses)) for row in encoded)
    place.console.print(
        f"{len(encoded):,} rows, {tokens:,} tokens; {dropped:,} longer than {max_length} left out\n"
        f"policy of {policy.parameters:,} parameters on {policy.device}", soft_wrap=True,
    )  # fmt: skip
    return encoded
