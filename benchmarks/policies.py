"""What the benchmarks of policies share: commands as a user types them, a served reward model, samples with their
proxy score, gold quality and KL, and intervals by bootstrap over prompts.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plaudit import Client
from plaudit.bon.statistics import in_order, kl_upper_bound, order_weights
from plaudit_loops.policy import load_policy
from plaudit_loops.rollout import sample, uniforms
from plaudit_model import starter

PLAUDIT = [sys.executable, "-P", "-c", "from plaudit.cli import main; main()"]
LENGTH, PROMPTS = 64, 12_000
SFT = ["--starter-records", "13000", "--epochs", "2", "--batch-size", "16", "--learning-rate", "4e-3"]
RL = [
    "--starter-prompts", str(PROMPTS), "--max-new-tokens", str(LENGTH), "--learning-rate", "5e-4",
    "--micro-batch", "16", "--ppo-epochs", "2", "--minibatches", "2", "--rollout-batch", "64",
    "--value-warmup-steps", "5", "--normalize", "reference", "--score-clip", "5", "--sample-every", "1",
    "--samples", "64",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sampled:
    """K responses to each of P prompts. `kl`: nats per response from the base policy, measured on the samples."""

    tasks: Sequence[starter.Task]
    texts: Sequence[Sequence[str]]
    gold_PK: np.ndarray
    lengths_PK: np.ndarray
    kl_PK: np.ndarray
    truncated: float


@dataclass(frozen=True)
class Cost:
    """What a command took. `cpu`: seconds of computing, its children's included; they count where others ran too."""

    wall: float
    cpu: float


def trained(out: Path, *arguments: object) -> Cost | None:
    """Run a command that leaves a policy in `out`; None if some of it was there, and so the cost is not known."""
    there = out.exists()
    cost = plaudit(*arguments, "--resume", "--out", out)
    return None if there else cost


def plaudit(*arguments: object) -> Cost:
    """Run a command. Raises CalledProcessError."""
    begun = time.monotonic()
    process = subprocess.Popen([*PLAUDIT, *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return Cost(time.monotonic() - begun, usage.ru_utime + usage.ru_stime)


@contextmanager
def served(models: Mapping[int, Path]) -> Iterator[dict[int, str]]:
    """Reward models by port, served until the block ends; their addresses."""
    running = [
        subprocess.Popen([*PLAUDIT, "serve", str(model), "--port", str(port)], stdout=subprocess.DEVNULL)
        for port, model in models.items()
    ]
    try:
        urls = {port: f"http://127.0.0.1:{port}" for port in models}
        for url in urls.values():
            with Client(url) as client:
                client.wait_until_ready()
        yield urls
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(60)


def fitted(work: Path, seed: int) -> tuple[Path, Cost | None]:
    """The SFT policy of a seed, and what it cost, unless it was there."""
    return work / "sft" / "policy", trained(work / "sft", "sft", "starter", *SFT, "--seed", seed)


def sampled(policy: Path, base: Path, tasks: Sequence[starter.Task], samples: int, stream_seed: int = 0) -> Sampled:
    """Sample at temperature 1, judge by computation, and compare with the base policy."""
    loaded, reference = (load_policy(path, device="cpu", autocast=False) for path in (policy, base))
    texts: list[list[str]] = []
    gold, lengths, kls, cut = [], [], [], 0
    size = max(1, 512 // samples)
    for start in range(0, len(tasks), size):
        part = tasks[start : start + size]
        ids = [loaded.encode_prompt(task.prompt) for task in part]
        keys = [(start, i) for i in range(len(part) * samples)]
        made = sample(loaded, ids, uniforms(stream_seed, "evaluation", keys, LENGTH), temperature=1.0)
        if policy == base:
            kls.append(np.zeros((len(part), samples)))
        else:
            said = reference.say([(ids[i // samples], r.ids) for i, r in enumerate(made)], 1.0).logprobs_BR.detach()
            kl = [sum(r.logprobs) - float(row.sum()) for r, row in zip(made, said, strict=True)]
            kls.append(np.array(kl).reshape(len(part), samples))
        groups = [[loaded.decode(r.ids) for r in made[i : i + samples]] for i in range(0, len(made), samples)]
        texts += groups
        gold += [[starter.quality(t, text) for text in group] for t, group in zip(part, groups, strict=True)]
        lengths.append(np.array([len(r.ids) for r in made]).reshape(len(part), samples))
        cut += sum(not r.ended for r in made)
    return Sampled(
        tasks, texts, np.array(gold), np.concatenate(lengths), np.concatenate(kls), cut / (len(tasks) * samples)
    )


def scores_of(url: str, tasks: Sequence[starter.Task], texts: Sequence[Sequence[str]]) -> np.ndarray:
    """The served scores, (P, K)."""
    with Client(url, timeout=None) as client:
        items = [{"prompt": t.prompt, "responses": list(group)} for t, group in zip(tasks, texts, strict=True)]
        flat = iter(client.score_items(items))
        return np.array([[float(next(flat)) for _ in group] for group in texts])


def gain(after_P: np.ndarray, before_P: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Mean gain over the same prompts, and its 95% interval: bootstrap over prompts."""
    per_prompt = after_P - before_P
    means = np.random.default_rng(0).choice(per_prompt, (draws, len(per_prompt))).mean(1)
    return float(per_prompt.mean()), *map(float, np.quantile(means, (0.025, 0.975)))


def best_of(proxy_PK: np.ndarray, other_PK: np.ndarray, n: int) -> np.ndarray:
    """The expected value (P,) of `other` at the best of n by `proxy`: unbiased, from K >= n samples of each prompt."""
    weights = np.zeros(proxy_PK.shape[1])
    found = order_weights(n, proxy_PK.shape[1])
    weights[: len(found)] = found
    ordered = [in_order(p.tolist(), o.tolist())[1] for p, o in zip(proxy_PK, other_PK, strict=True)]
    return np.array(ordered) @ weights


def n_at(kl: float, most: int) -> int:
    """The n of best-of-n whose KL bound is nearest to `kl`."""
    return min(range(1, most + 1), key=lambda n: abs(kl_upper_bound(n) - kl))


def path_of(run: Path, seed: int, prompts: int) -> dict[str, np.ndarray]:
    """A run as it went, one entry a step: KL, and the gold quality of the responses that it learnt from, (steps, K)."""
    tasks = {task.prompt: task for task in starter.tasks(prompts, seed)}
    gold: dict[int, list[float]] = {}
    with (run / "samples.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            gold.setdefault(row["step"], []).append(starter.quality(tasks[row["prompt"]], row["response"]))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    names = ("objective/kl", "objective/scores", "objective/entropy", "val/length", "val/truncated", "val/distinct_2")
    found = {name.rpartition("/")[2]: np.array([m[name] for m in metrics], float) for name in names}
    fewest = min(map(len, gold.values()))
    return found | {"gold_TK": np.array([gold[step][:fewest] for step in sorted(gold)])}


def smooth(values_T: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred moving averages, over fewer at the ends."""
    half = width // 2
    return np.array([values_T[max(0, t - half) : t + half + 1].mean() for t in range(len(values_T))])


def root(kl: float) -> float:
    """sqrt(KL), 0 for an estimate below 0."""
    return math.sqrt(max(kl, 0.0))
