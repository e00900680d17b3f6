"""Policy optimisation against a served reward model, in minutes on a CPU: does the score rise, and does the quality
that can be computed rise with it?

A policy of a million parameters is fitted from scratch by `plaudit sft starter` to good and bad answers of the starter
tasks. From there `plaudit rl` (PPO, GRPO, RLOO, REINFORCE++) and `plaudit dpo` (best against worst of six samples)
optimise it against the served starter reward model, all with the commands that a user types. Measured on held-out
prompts, the same for all: the proxy (the served score), the gold quality (`plaudit_model.starter.quality`) and the KL
from the SFT policy. Beside each, best-of-n of the SFT policy at the n whose KL bound, log n - (n - 1) / n, is nearest:
unbiased, from 256 samples to each of 80 prompts. Intervals: bootstrap over prompts of the gain over SFT, within a seed.

One seed is a run of less than 20 minutes on two quiet cores. What is in --work is not done again, and gives no new row.

    python benchmarks/loops.py --seeds 0 1 2
    python benchmarks/loops.py --seeds 0 1 2 --page docs/loops.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import charts
import numpy as np
import page
import policies
import rows
from policies import Cost, plaudit

from plaudit.bon.statistics import kl_upper_bound
from plaudit_model import starter

ALGORITHMS = ("ppo", "grpo", "rloo", "reinforce++", "dpo")
GROUPS = {"ppo": 1, "reinforce++": 1, "grpo": 4, "rloo": 4}
PROMPTS, SAMPLES, POOL_PROMPTS, POOL = 300, 4, 80, 256
PORT = 8921


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS, choices=ALGORITHMS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--responses", type=int, default=64, help="responses of a step")
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--kl-budget", type=float, default=8.0)
    parser.add_argument("--jobs", type=int, default=2, help="algorithms that train at the same time, one core each")
    parser.add_argument("--work", type=Path, default=Path("runs/loops"))
    parser.add_argument("--page", type=Path, help="put what has been measured into this page, and run nothing")
    arguments = parser.parse_args()
    if arguments.page:
        draw(arguments.work, arguments.seeds, arguments.page.with_suffix(""))
        page.fill(arguments.page, "algorithms", algorithms_table(arguments.seeds))
        page.fill(arguments.page, "answers", answers(arguments.work / f"seed-{arguments.seeds[0]}"))
        return
    plaudit("train", "starter", "--if-missing")
    port = PORT + arguments.seeds[0]
    with policies.served({port: starter.directory()}) as urls:
        for seed in arguments.seeds:
            compare(arguments, arguments.work / f"seed-{seed}", seed, urls[port])


def compare(arguments: argparse.Namespace, work: Path, seed: int, url: str) -> None:
    """One seed: SFT, then every algorithm from it."""
    base, cost = policies.fitted(work, seed)
    before, fresh = measured(work, "sft", base, base, url)
    pool_of(work, base, url)
    if fresh:
        record("sft", seed, before, before, work, cost)

    pairs = paired(work, base, url, seed) if "dpo" in arguments.algorithms else work

    def train(algorithm: str) -> Cost | None:  # in threads, so all that it does is to wait for a command
        if algorithm == "dpo":
            return by_dpo(pairs, work / "dpo", base, seed)
        return by_rl(arguments, work / algorithm, base, url, seed, algorithm)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for algorithm, cost in zip(arguments.algorithms, pool.map(train, arguments.algorithms), strict=True):
            after, fresh = measured(work, algorithm, work / algorithm / "policy", base, url)
            if fresh:
                record(algorithm, seed, after, before, work, cost)


def by_rl(arguments: argparse.Namespace, out: Path, base: Path, url: str, seed: int, algorithm: str) -> Cost | None:
    group = GROUPS[algorithm]
    size = ["--group-size", group, "--prompts-per-step", arguments.responses // group, "--steps", arguments.steps]
    limits = ["--kl-in", "reward", "--kl-coef", arguments.kl_coef, "--kl-budget", arguments.kl_budget]
    options = ["--policy", base, "--url", url, "--algo", algorithm, "--seed", seed]
    return policies.trained(out, "rl", *policies.RL, *size, *limits, *options)


def paired(work: Path, base: Path, url: str, seed: int, prompts: int = 1500, samples: int = 6) -> Path:
    """Pairs of the SFT policy's own responses, by the served score; equal texts make no pair."""
    pairs = work / "pairs.jsonl"
    if not pairs.exists():
        tasks = starter.tasks(prompts, seed)
        made = policies.sampled(base, base, tasks, samples)
        lines = []
        for task, texts, scores in zip(tasks, made.texts, policies.scores_of(url, tasks, made.texts), strict=True):
            best, worst = texts[int(np.argmax(scores))], texts[int(np.argmin(scores))]
            if best != worst:
                lines.append(json.dumps({"prompt": task.prompt, "chosen": best, "rejected": worst}) + "\n")
        pairs.write_text("".join(lines), encoding="utf-8")
    return pairs


def by_dpo(pairs: Path, out: Path, base: Path, seed: int) -> Cost | None:
    rate = ["--learning-rate", "2e-4", "--beta", "0.1", "--epochs", "2", "--seed", seed, "--micro-batch", "16"]
    return policies.trained(out, "dpo", pairs, "--policy", base, *rate)


def measured(work: Path, name: str, policy: Path, base: Path, url: str) -> tuple[dict[str, Any], bool]:
    """Numbers of a policy on the held-out prompts, by prompt, and whether they are new."""
    path = work / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8")), False
    tasks = starter.tasks(PROMPTS, starter.HELD_OUT_SEEDS)
    made = policies.sampled(policy, base, tasks, SAMPLES, stream_seed=1)
    found = {
        "proxy": policies.scores_of(url, tasks, made.texts).mean(1).tolist(),
        "gold": made.gold_PK.mean(1).tolist(),
        "kl": float(made.kl_PK.mean()),
        "tokens": float(made.lengths_PK.mean()),
        "truncated": made.truncated,
        "prompts": [task.prompt for task in tasks],
        "kinds": [task.kind for task in tasks],
        "texts": [list(texts) for texts in made.texts],
    }
    path.write_text(json.dumps(found), encoding="utf-8")
    return found, True


def pool_of(work: Path, base: Path, url: str) -> Mapping[str, np.ndarray]:
    """Many samples of the SFT policy to a few held-out prompts: what best-of-n chooses from."""
    path = work / "pool.npz"
    if not path.exists():
        tasks = starter.tasks(POOL_PROMPTS, starter.HELD_OUT_SEEDS)
        made = policies.sampled(base, base, tasks, POOL)
        (work / "pool.json").write_text(json.dumps(made.texts), encoding="utf-8")
        scores = policies.scores_of(url, tasks, made.texts)
        np.savez(path, proxy=scores, gold=made.gold_PK, lengths=made.lengths_PK)
    return dict(np.load(path))


def record(name: str, seed: int, after: Mapping[str, Any], before: Mapping[str, Any], work: Path, cost: Cost) -> None:
    columns: dict[str, object] = {"policy": name, "seed": seed}
    for what in ("proxy", "gold"):
        values, base = np.array(after[what]), np.array(before[what])
        columns[what] = round(float(values.mean()), 4)
        columns |= interval(what, policies.gain(values, base))
    pool = dict(np.load(work / "pool.npz"))
    n = policies.n_at(after["kl"], POOL)
    columns |= {
        "kl": round(after["kl"], 3), "tokens": round(after["tokens"], 2), "truncated": round(after["truncated"], 4),
        "prompts": len(after["gold"]), "best_of_n": n, "best_of_n_kl_bound": round(kl_upper_bound(n), 3),
    }  # fmt: skip
    for what in ("proxy", "gold"):
        best_P = policies.best_of(pool["proxy"], pool[what], n)
        columns |= interval(f"best_of_n_{what}", policies.gain(best_P, pool[what].mean(1)))
    columns |= {"wall_s": round(cost.wall), "cpu_s": round(cost.cpu)} if cost else {"wall_s": "", "cpu_s": ""}
    rows.append("loops", columns)


def interval(name: str, found: tuple[float, float, float]) -> dict[str, float]:
    mean, low, high = (round(value, 4) for value in found)
    return {f"{name}_gain": mean, f"{name}_gain_low": low, f"{name}_gain_high": high}


def draw(work: Path, seeds: Sequence[int], out: Path) -> None:
    """Curves of PPO by step, and the gold quality that each algorithm reaches at its KL, beside best-of-n."""
    panels = {name: charts.Panel(name, "step", "") for name in ("proxy (served score)", "gold quality", "KL, nats")}
    for place, seed in enumerate(seeds):
        found = policies.path_of(work / f"seed-{seed}" / "ppo", seed, policies.PROMPTS)
        shown = (found["scores"], found["gold_TK"].mean(1), found["kl"])
        steps = np.arange(1, len(found["kl"]) + 1)
        for panel, values in zip(panels.values(), shown, strict=True):
            panel.line(f"seed {seed}", steps, policies.smooth(values), place)
    charts.write(out / "ppo.svg", list(panels.values()))
    frontier = []
    for seed in seeds:
        panel = charts.Panel(f"seed {seed}", "sqrt(KL), nats", "gold quality, gain over SFT")
        pool = dict(np.load(work / f"seed-{seed}" / "pool.npz"))
        grid = [n for n in range(1, POOL + 1) if n < 16 or n % 8 == 0]
        gains = [policies.best_of(pool["proxy"], pool["gold"], n).mean() - pool["gold"].mean() for n in grid]
        panel.line("best-of-n (bound)", np.sqrt([kl_upper_bound(n) for n in grid]), np.array(gains), 0)
        before = json.loads((work / f"seed-{seed}" / "sft.json").read_text(encoding="utf-8"))
        for place, name in enumerate(ALGORITHMS, 1):
            if not (work / f"seed-{seed}" / f"{name}.json").exists():
                continue
            after = json.loads((work / f"seed-{seed}" / f"{name}.json").read_text(encoding="utf-8"))
            gain = policies.gain(np.array(after["gold"]), np.array(before["gold"]))
            panel.point(name, policies.root(after["kl"]), gain, place)
        frontier.append(panel)
    charts.write(out / "frontier.svg", frontier)


def algorithms_table(seeds: Sequence[int]) -> str:
    """One row for each seed and algorithm."""
    known = sorted(page.newest("loops", "policy", "seed"), key=lambda row: int(row["seed"]))
    body = [
        [row["policy"], row["seed"], page.cell(row, "proxy_gain"), page.cell(row, "gold_gain"), page.cell(row, "kl"),
         row["best_of_n"], page.cell(row, "best_of_n_proxy_gain"), page.cell(row, "best_of_n_gold_gain"), row["cpu_s"]]
        for name in ALGORITHMS for row in known if row["policy"] == name and int(row["seed"]) in seeds
    ]  # fmt: skip
    head = ["algorithm", "seed", "proxy, gain", "gold, gain", "KL", "n", "best of n: proxy", "best of n: gold", "CPU s"]
    return page.table(head, body)


def answers(work: Path, each: int = 2) -> str:
    """What SFT and PPO answer to the first held-out prompts of each kind, two samples each, as they come."""
    before, after = (json.loads((work / f"{name}.json").read_text(encoding="utf-8")) for name in ("sft", "ppo"))
    lines = []
    for kind in dict.fromkeys(before["kinds"]):
        for place in [i for i, own in enumerate(before["kinds"]) if own == kind][:each]:
            lines.append(f"> {before['prompts'][place]}")
            for name, found in (("SFT", before), ("PPO", after)):
                lines += [f"    {name}  {text!r}" for text in found["texts"][place][:2]]
            lines.append("")
    return "```text\n" + "\n".join(lines).rstrip() + "\n```"


if __name__ == "__main__":
    main()
