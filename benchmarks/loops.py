"""Policy optimisation against a served reward model, in minutes on a CPU: does the score rise, and does the quality
that can be computed rise with it?

A policy of a million parameters is fitted from scratch by `plaudit sft starter` to good and bad answers of the starter
tasks. From there `plaudit rl` (PPO, GRPO, RLOO, REINFORCE++) and `plaudit dpo` (best against worst of eight samples)
optimise it against the served starter reward model, all with the commands that a user types. Measured on held-out
prompts, the same for all: the proxy (the served score), the gold quality (`plaudit_model.starter.quality`), the KL from
the SFT policy, and best-of-n of the SFT policy at the nearest KL bound (log n - (n - 1) / n). Intervals: bootstrap over
prompts of the gain over SFT, within each seed.

`--weak` adds a run against a reward model fitted to few preferences, without a KL penalty: proxy and gold along the run
against sqrt(KL) show over-optimisation (Gao et al. 2210.10760).

    python benchmarks/loops.py --seeds 0 1 2 --weak
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rows

from plaudit import Client
from plaudit_loops.policy import load_policy
from plaudit_loops.rollout import sample, uniforms
from plaudit_model import starter

PLAUDIT = [sys.executable, "-P", "-c", "from plaudit.cli import main; main()"]
ALGORITHMS = ("ppo", "grpo", "rloo", "reinforce++")
LENGTH, BEST_OF = 64, 32
COMMON = [
    "--starter-prompts", "6000", "--max-new-tokens", str(LENGTH), "--learning-rate", "5e-4", "--micro-batch", "64",
    "--ppo-epochs", "2", "--minibatches", "2", "--rollout-batch", "128", "--value-warmup-steps", "5",
    "--normalize", "reference", "--score-clip", "5", "--report-to", "tensorboard",
]  # fmt: skip
GROUPS = {"ppo": 1, "reinforce++": 1, "grpo": 4, "rloo": 4}


@dataclass(frozen=True, eq=False)
class Measured:
    """Responses to the held-out prompts: (prompts, samples) each."""

    proxy_PK: np.ndarray
    gold_PK: np.ndarray
    kl: float
    truncated: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", default=[*ALGORITHMS, "dpo"])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--responses", type=int, default=128, help="responses of a step")
    parser.add_argument("--sft-records", type=int, default=13_000)
    parser.add_argument("--sft-epochs", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=300, help="held-out prompts")
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--kl-budget", type=float, default=12.0)
    parser.add_argument("--weak", action="store_true", help="over-optimise a weak reward model too")
    parser.add_argument("--weak-records", type=int, default=250)
    parser.add_argument("--work", type=Path, default=Path("runs/loops"))
    arguments = parser.parse_args()
    plaudit("train", "starter", "--if-missing")
    with served(starter.directory(), 8921) as url:
        for seed in arguments.seeds:
            compare(arguments, seed, url)
    if arguments.weak:
        overoptimise(arguments)


def compare(arguments: argparse.Namespace, seed: int, url: str) -> None:
    """One seed: SFT, then every algorithm from it."""
    work = arguments.work / f"seed-{seed}"
    base = fitted(arguments, work, seed)
    before = measure(base, base, url, arguments.prompts, BEST_OF)
    record("sft", seed, before, before, 0.0)
    for algorithm in arguments.algorithms:
        begun = time.monotonic()
        if algorithm == "dpo":
            policy = by_dpo(work, base, url, seed)
        else:
            policy = by_rl(arguments, work / algorithm, base, url, seed, algorithm)
        after = measure(policy, base, url, arguments.prompts, 4)
        record(algorithm, seed, after, before, time.monotonic() - begun)
        n = next((n for n in range(1, BEST_OF) if math.log(n) - (n - 1) / n >= after.kl), BEST_OF)
        best = best_of(before, n)
        record(f"best of {n} (KL bound {best.kl:.2f}) beside {algorithm}", seed, best, before, 0.0)


def fitted(arguments: argparse.Namespace, work: Path, seed: int) -> Path:
    """The SFT policy of a seed, fitted unless it is there."""
    options = ["--starter-records", arguments.sft_records, "--epochs", arguments.sft_epochs, "--batch-size", "16"]
    plaudit("sft", "starter", *options, "--learning-rate", "4e-3", "--seed", seed, "--resume", "--out", work / "sft")
    return work / "sft" / "policy"


def by_rl(arguments: argparse.Namespace, out: Path, base: Path, url: str, seed: int, algorithm: str) -> Path:
    group = GROUPS[algorithm]
    size = ["--group-size", group, "--prompts-per-step", arguments.responses // group, "--steps", arguments.steps]
    limits = ["--kl-in", "reward", "--kl-coef", arguments.kl_coef, "--kl-budget", arguments.kl_budget]
    options = ["--policy", base, "--url", url, "--algo", algorithm, "--seed", seed, "--resume", "--out", out]
    plaudit("rl", *COMMON, *size, *limits, *options)
    return out / "policy"


def by_dpo(work: Path, base: Path, url: str, seed: int, prompts: int = 2000, samples: int = 8) -> Path:
    """Pairs of the SFT policy's own responses, by the served score; equal texts make no pair."""
    pairs = work / "pairs.jsonl"
    if not pairs.exists():
        tasks = starter.tasks(prompts, seed)
        with pairs.open("w") as file:
            for task, texts, scores in zip(tasks, *responses(base, tasks, samples, url), strict=True):
                best, worst = int(np.argmax(scores)), int(np.argmin(scores))
                if texts[best] != texts[worst]:
                    pair = {"prompt": task.prompt, "chosen": texts[best], "rejected": texts[worst]}
                    file.write(json.dumps(pair) + "\n")
    rate = ["--learning-rate", "2e-4", "--beta", "0.1", "--epochs", "2", "--seed", seed]
    plaudit("dpo", pairs, "--policy", base, *rate, "--resume", "--out", work / "dpo")
    return work / "dpo" / "policy"


def overoptimise(arguments: argparse.Namespace) -> None:
    """PPO without a penalty against a weak reward model: the proxy goes on rising, the gold does not."""
    work = arguments.work / "weak"
    model = work / "reward"
    if not (model / "reward.json").exists():
        changes = ["--set", f"data.starter_records={arguments.weak_records}", "--eval-share", "0"]
        plaudit("train", "starter", "--out", model, *changes)
    base = fitted(arguments, arguments.work / f"seed-{arguments.seeds[0]}", arguments.seeds[0])
    with served(model, 8922) as url:
        before = measure(base, base, url, arguments.prompts, 4)
        record("weak: sft", arguments.seeds[0], before, before, 0.0)
        stages = [
            arguments.steps // 8,
            arguments.steps // 4,
            arguments.steps // 2,
            arguments.steps,
            2 * arguments.steps,
        ]
        for steps in stages:  # with a constant rate a shorter run is the beginning of a longer one
            out = work / f"ppo-{steps}"
            options = ["--steps", steps, "--prompts-per-step", arguments.responses, "--kl-coef", "0", "--resume"]
            constant = ["--warmup-ratio", "0", "--min-lr-ratio", "1"]
            plaudit("rl", *COMMON, *options, *constant, "--policy", base, "--url", url, "--out", out)
            after = measure(out / "policy", base, url, arguments.prompts, 4)
            record(f"weak: ppo, {steps} steps", arguments.seeds[0], after, before, 0.0)


def measure(policy: Path, base: Path, url: str, prompts: int, samples: int) -> Measured:
    """Sample on held-out prompts, score, judge, and compare with the base policy."""
    tasks = starter.tasks(prompts, starter.HELD_OUT_SEEDS)
    loaded, reference = (load_policy(path, device="cpu", autocast=False) for path in (policy, base))
    proxy, gold, divergence, cut = [], [], [], 0
    for start in range(0, len(tasks), 16):
        part = tasks[start : start + 16]
        ids = [loaded.encode_prompt(task.prompt) for task in part]
        keys = [(start, i) for i in range(len(part) * samples)]
        made = sample(loaded, ids, uniforms(0, "evaluation", keys, LENGTH), temperature=1.0)
        before = reference.say([(ids[i // samples], r.ids) for i, r in enumerate(made)], 1.0).logprobs_BR.detach()
        divergence += [sum(r.logprobs) - float(row.sum()) for r, row in zip(made, before, strict=True)]
        texts = [loaded.decode(r.ids) for r in made]
        cut += sum(not r.ended for r in made)
        groups = [texts[i * samples : (i + 1) * samples] for i in range(len(part))]
        proxy += scores_of(url, part, groups)
        gold += [[starter.quality(t, text) for text in group] for t, group in zip(part, groups, strict=True)]
    return Measured(np.array(proxy), np.array(gold), float(np.mean(divergence)), cut / (len(tasks) * samples))


def responses(
    policy: Path, tasks: Sequence[starter.Task], samples: int, url: str
) -> tuple[list[list[str]], list[list[float]]]:
    """Texts and scores of samples of a policy."""
    loaded = load_policy(policy, device="cpu", autocast=False)
    texts: list[list[str]] = []
    for start in range(0, len(tasks), 16):
        part = tasks[start : start + 16]
        keys = [(len(tasks) + start, i) for i in range(len(part) * samples)]
        ids = [loaded.encode_prompt(task.prompt) for task in part]
        made = sample(loaded, ids, uniforms(0, "evaluation", keys, LENGTH), temperature=1.0)
        texts += [[loaded.decode(r.ids) for r in made[i * samples : (i + 1) * samples]] for i in range(len(part))]
    return texts, scores_of(url, tasks, texts)


def scores_of(url: str, tasks: Sequence[starter.Task], texts: Sequence[Sequence[str]]) -> list[list[float]]:
    with Client(url) as client:
        items = [{"prompt": t.prompt, "responses": list(group)} for t, group in zip(tasks, texts, strict=True)]
        flat = iter(client.score_items(items))
        return [[float(next(flat)) for _ in group] for group in texts]


def best_of(measured: Measured, n: int) -> Measured:
    """The best by proxy of the first n samples of each prompt."""
    chosen = measured.proxy_PK[:, :n].argmax(1)[:, None]
    proxy, gold = (np.take_along_axis(x, chosen, 1) for x in (measured.proxy_PK, measured.gold_PK))
    return Measured(proxy, gold, math.log(n) - (n - 1) / n, 0.0)


def gain(after: np.ndarray, before: np.ndarray) -> tuple[float, float, float]:
    """Mean gain over the same prompts, with a 95% interval: bootstrap over prompts."""
    per_prompt = after.mean(1) - before.mean(1)
    draws = np.random.default_rng(0).choice(per_prompt, (2000, len(per_prompt))).mean(1)
    return float(per_prompt.mean()), *map(float, np.quantile(draws, (0.025, 0.975)))


def record(name: str, seed: int, after: Measured, before: Measured, seconds: float) -> None:
    proxy, gold = gain(after.proxy_PK, before.proxy_PK), gain(after.gold_PK, before.gold_PK)
    rows.append(
        "loops",
        {
            "policy": name,
            "seed": seed,
            "proxy": round(float(after.proxy_PK.mean()), 4),
            "proxy_gain_low": round(proxy[1], 4),
            "proxy_gain_high": round(proxy[2], 4),
            "gold": round(float(after.gold_PK.mean()), 4),
            "gold_gain_low": round(gold[1], 4),
            "gold_gain_high": round(gold[2], 4),
            "kl": round(after.kl, 3),
            "sqrt_kl": round(math.sqrt(max(after.kl, 0.0)), 3),
            "truncated": round(after.truncated, 4),
            "prompts": len(after.proxy_PK),
            "seconds": round(seconds),
        },
    )


def plaudit(*arguments: object) -> None:
    subprocess.run([*PLAUDIT, *map(str, arguments)], check=True)


@contextmanager
def served(model: Path, port: int) -> Iterator[str]:
    """A reward model, served until the block ends."""
    process = subprocess.Popen([*PLAUDIT, "serve", str(model), "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        with Client(url) as client:
            client.wait_until_ready()
        yield url
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
