"""What happens when a policy is optimised against a reward model that knows too little (Gao et al. 2210.10760).

Four weak reward models, alike but for their seed, are fitted to 500 records of the starter tasks (the starter model has
2,900). The SFT policies of `loops.py` are optimised against one of them and against what all four say: best-of-n, n up
to 256, and PPO without a KL penalty, at a constant learning rate. Gold quality is computed, so it can be seen to fall
while the proxy rises.

    best-of-n   256 samples to each of 80 held-out prompts, unbiased for every n; R(d) = d (alpha - beta d)
    PPO         what the run sampled, step by step; R(d) = d (alpha - beta log d)

d = sqrt(KL), R the gain in gold quality over SFT; for best-of-n KL is its bound. Remedies: the ensemble's mean, its
worst case, mean - u x spread (UWO; Coste et al. 2310.02743), a price for length and, for PPO, a KL penalty. Intervals:
bootstrap over prompts.

    python benchmarks/loops.py --seeds 0 && python benchmarks/overoptimisation.py --seeds 0
    python benchmarks/overoptimisation.py --seeds 0 --page docs/loops.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import charts
import numpy as np
import page
import policies
import rows
from policies import Cost, plaudit

from plaudit.bon.statistics import fit, in_order, kl_upper_bound
from plaudit_model import starter

MEMBERS, RECORDS, PORT, DRAWS = 4, 500, 8941, 500
VARIANCE_PENALTY, LENGTH_PRICE = 0.5, 0.5
ENSEMBLE = ("ensemble mean", "ensemble worst", "ensemble UWO")
REMEDIES: dict[str, list[object]] = {
    "one model": [],
    "ensemble UWO": ["--uncertainty", "0.5"],
    "KL penalty": ["--kl-coef", "0.1"],
    "ensemble worst": ["--worst-case"],
    "length price": ["--length-ramp", "64", "--length-penalty", "2"],
    "ensemble mean": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the SFT policies; seed s meets member s")
    parser.add_argument("--remedies", nargs="*", default=list(REMEDIES), choices=REMEDIES, help="of PPO")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--responses", type=int, default=64, help="responses of a step")
    parser.add_argument("--work", type=Path, default=Path("runs/loops"), help="that of loops.py")
    parser.add_argument("--page", type=Path, help="put what has been measured into this page, and run nothing")
    arguments = parser.parse_args()
    if arguments.page:
        draw(arguments, arguments.page.with_suffix(""))
        for optimiser in ("best-of-n", "ppo"):
            page.fill(arguments.page, f"weak {optimiser}", weak_table(optimiser, arguments.seeds))
        return
    models = {PORT + arguments.seeds[0] * MEMBERS + i: weak(arguments.work / "weak", i) for i in range(MEMBERS)}
    with policies.served(models) as urls:
        for seed in arguments.seeds:
            work = arguments.work / f"seed-{seed}"
            scored(work, list(urls.values()))
            best_of_n(work, seed)
            for remedy in arguments.remedies:
                ppo(arguments, work, seed, remedy, list(urls.values()))


def weak(work: Path, seed: int) -> Path:
    """A reward model of few preferences."""
    out = work / f"member-{seed}"
    if not (out / "reward.json").exists():
        plaudit("train", "starter", "--out", out, "--set", f"data.starter_records={RECORDS}", "--eval-share", "0",
                "--seed", seed)  # fmt: skip
    return out


# -- best-of-n -------------------------------------------------------------------------------------------------------


def scored(work: Path, urls: Sequence[str]) -> None:
    """The pool of the SFT policy's samples, scored by every member: (E, P, K)."""
    if not (work / "weak.npy").exists():
        texts = json.loads((work / "pool.json").read_text(encoding="utf-8"))
        tasks = starter.tasks(len(texts), starter.HELD_OUT_SEEDS)
        np.save(work / "weak.npy", np.stack([policies.scores_of(url, tasks, texts) for url in urls]))


def proxies(work: Path, seed: int) -> dict[str, np.ndarray]:
    """What best-of-n chooses by, (P, K) each: members are brought to mean 0 and deviation 1 over the pool."""
    scores_EPK, lengths_PK = np.load(work / "weak.npy"), np.load(work / "pool.npz")["lengths"]
    scores_EPK = (scores_EPK - scores_EPK.mean((1, 2), keepdims=True)) / scores_EPK.std((1, 2), keepdims=True)
    one_PK = scores_EPK[seed % MEMBERS]
    return {
        "one model": one_PK,
        "ensemble mean": scores_EPK.mean(0),
        "ensemble worst": scores_EPK.min(0),
        "ensemble UWO": scores_EPK.mean(0) - VARIANCE_PENALTY * scores_EPK.var(0),
        "length price": one_PK - LENGTH_PRICE * lengths_PK / lengths_PK.std(),
    }


def best_of_n(work: Path, seed: int) -> None:
    if (work / "bon.done").exists():
        return
    pool = np.load(work / "pool.npz")
    everything = proxies(work, seed) | {"starter model": pool["proxy"]}
    for name, proxy_PK in everything.items():
        size = proxy_PK.shape[1]
        curve_NP = np.array([policies.best_of(proxy_PK, pool["gold"], n) for n in range(1, size + 1)])
        ordered = [in_order(p.tolist(), g.tolist())[1] for p, g in zip(proxy_PK, pool["gold"], strict=True)]
        found = fit(ordered, size, resamples=DRAWS, seed=0)
        assert found is not None
        best = int(curve_NP.mean(1).argmax())
        record("best-of-n", name, seed, {
            "alpha": found.alpha.value, "alpha_low": found.alpha.low, "alpha_high": found.alpha.high,
            "beta": found.beta.value, "beta_low": found.beta.low, "beta_high": found.beta.high, "r2": found.r2,
            "fit_peak_sqrt_kl": found.alpha.value / (2 * found.beta.value) if found.beta.value > 0 else None,
            "peak_at": best + 1, "peak_sqrt_kl": policies.root(kl_upper_bound(best + 1)),
            **interval("peak", policies.gain(curve_NP[best], curve_NP[0])),
            "end_sqrt_kl": policies.root(kl_upper_bound(size)),
            **interval("end", policies.gain(curve_NP[-1], curve_NP[0])),
        }, None)  # fmt: skip
    (work / "bon.done").touch()


# -- PPO -------------------------------------------------------------------------------------------------------------


def ppo(arguments: argparse.Namespace, work: Path, seed: int, remedy: str, urls: Sequence[str]) -> None:
    """A run against the weak models, and how its gold quality went with sqrt(KL)."""
    out, base = work / f"weak-{remedy.replace(' ', '-')}", work / "sft" / "policy"
    if (out / "report.json").exists():
        return
    asked = urls if remedy in ENSEMBLE else [urls[seed % MEMBERS]]
    size = ["--prompts-per-step", arguments.responses, "--steps", arguments.steps, "--seed", seed]
    constant = ["--warmup-ratio", "0", "--min-lr-ratio", "1", "--kl-coef", "0"]
    places = [part for url in asked for part in ("--url", url)]
    cost = policies.trained(out, "rl", *policies.RL, *size, *constant, *REMEDIES[remedy], *places, "--policy", base)
    kl_T, gain_TK = course(out, seed)
    smooth_T = policies.smooth(gain_TK.mean(1))
    best, draws = int(smooth_T.argmax()), resampled(kl_T, gain_TK)
    alpha, beta, r2 = least_squares(kl_T, gain_TK.mean(1))
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    record("ppo", remedy, seed, {
        "alpha": alpha, "alpha_low": low[0], "alpha_high": high[0],
        "beta": beta, "beta_low": low[1], "beta_high": high[1], "r2": r2,
        "fit_peak_sqrt_kl": float(np.exp(alpha / beta - 1)) if beta > 0 else None,
        "peak_at": best + 1, "peak_sqrt_kl": policies.root(policies.smooth(kl_T)[best]),
        **interval("peak", window(gain_TK, best)),
        "end_sqrt_kl": policies.root(policies.smooth(kl_T)[-1]),
        **interval("end", window(gain_TK, len(gain_TK) - 5)),
    }, cost)  # fmt: skip


def course(run: Path, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """KL (T,) and gain in gold (T, K) of the responses of each step over those of the steps in which only the value
    head learnt, which are the SFT policy's."""
    found = policies.path_of(run, seed, policies.PROMPTS)
    warmup = int(policies.RL[policies.RL.index("--value-warmup-steps") + 1])
    gold_TK = found["gold_TK"]
    return found["kl"], gold_TK - gold_TK[: warmup + 1].mean()


def window(gain_TK: np.ndarray, middle: int, half: int = 4) -> tuple[float, float, float]:
    """Mean and interval over the responses of the steps around one."""
    own = gain_TK[max(0, middle - half) : middle + half + 1].ravel()
    return policies.gain(own, np.zeros_like(own))


def least_squares(kl_T: np.ndarray, gain_T: np.ndarray) -> tuple[float, float, float]:
    """alpha, beta and r2 of gain = d (alpha - beta log d), over the steps that have left the start."""
    d = np.sqrt(np.maximum(kl_T, 0.0))
    kept = d > 0.1
    x = np.stack([d, -d * np.log(np.where(kept, d, 1.0))], 1)[kept]
    solution, *_ = np.linalg.lstsq(x, gain_T[kept], rcond=None)
    rest = gain_T[kept] - x @ solution
    return float(solution[0]), float(solution[1]), float(1 - rest.var() / gain_T[kept].var())


def resampled(kl_T: np.ndarray, gain_TK: np.ndarray) -> np.ndarray:
    """alpha and beta of fits to resampled responses, (draws, 2). Every response has a prompt of its own."""
    rng, (steps, samples) = np.random.default_rng(0), gain_TK.shape
    return np.array([
        least_squares(kl_T, np.take_along_axis(gain_TK, rng.integers(0, samples, (steps, samples)), 1).mean(1))[:2]
        for _ in range(DRAWS)
    ])  # fmt: skip


def interval(name: str, found: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((f"{name}_gain", f"{name}_gain_low", f"{name}_gain_high"), found, strict=True))


def record(kind: str, reward: str, seed: int, values: Mapping[str, float | None], cost: Cost | None) -> None:
    shown = {name: "" if value is None else round(value, 4) for name, value in values.items()}
    spent = {"wall_s": round(cost.wall), "cpu_s": round(cost.cpu)} if cost else {"wall_s": "", "cpu_s": ""}
    rows.append("overoptimisation", {"optimiser": kind, "reward": reward, "seed": seed, **shown, **spent})


# -- plots -----------------------------------------------------------------------------------------------------------


def draw(arguments: argparse.Namespace, out: Path) -> None:
    """Proxy and gold of one weak model; then the gold of all remedies: means over the seeds that are there."""
    works = [(arguments.work / f"seed-{seed}", seed) for seed in arguments.seeds]
    works = [(work, seed) for work, seed in works if (work / "weak.npy").exists()]
    curves = [bon_curves(work, seed) for work, seed in works]
    d_N = np.sqrt([kl_upper_bound(n) for n in range(1, len(curves[0]["one model"][0]) + 1)])
    both = charts.Panel("best-of-n, one weak model", "sqrt(KL bound), nats", "gain over SFT (proxy / 5)")
    remedies = charts.Panel("best-of-n, remedies", "sqrt(KL bound), nats", "gold quality, gain over SFT")
    for place, name in enumerate(curves[0]):
        proxy_N, gold_N = (np.mean([curve[name][part] for curve in curves], 0) for part in (0, 1))
        if name == "one model":
            both.line("proxy", d_N, proxy_N / 5, 1, dashed=True)
            both.line("gold", d_N, gold_N, 0)
        remedies.line(name, d_N, gold_N, place)
    charts.write(out / "best-of-n.svg", [both, remedies])
    panels = []
    for work, seed in works:
        panel = charts.Panel(f"PPO, seed {seed}", "sqrt(KL), nats", "gold quality, gain over SFT")
        for place, remedy in enumerate(REMEDIES):
            run = work / f"weak-{remedy.replace(' ', '-')}"
            if (run / "report.json").exists():
                kl_T, gain_TK = course(run, seed)
                panel.line(
                    remedy, np.sqrt(np.maximum(policies.smooth(kl_T), 0)), policies.smooth(gain_TK.mean(1)), place
                )
        panels += [panel] if panel.parts else []
    if panels:
        charts.write(out / "overoptimisation.svg", panels)


def weak_table(optimiser: str, seeds: Sequence[int]) -> str:
    """One row for each seed and remedy."""
    known = page.newest("overoptimisation", "optimiser", "reward", "seed")
    body = [
        [row["reward"], row["seed"], row["peak_at"], page.cell(row, "peak_sqrt_kl"), page.cell(row, "peak_gain"),
         page.cell(row, "end_sqrt_kl"), page.cell(row, "end_gain"), page.cell(row, "alpha"), page.cell(row, "beta"),
         page.cell(row, "r2")]
        for row in sorted(known, key=lambda row: (row["reward"] != "one model", row["reward"], row["seed"]))
        if row["optimiser"] == optimiser and int(row["seed"]) in seeds
    ]  # fmt: skip
    at = "n" if optimiser == "best-of-n" else "step"
    head = ["reward", "seed", f"peak at {at}", "sqrt(KL) there", "gold gain there", "sqrt(KL) at the end",
            "gold gain at the end", "alpha", "beta", "r2 of the fit"]  # fmt: skip
    return page.table(head, body)


def bon_curves(work: Path, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Gains (n,) in proxy and gold for every n."""
    gold_PK = np.load(work / "pool.npz")["gold"]
    return {
        name: tuple(
            np.array([policies.best_of(proxy_PK, other, n).mean() for n in range(1, proxy_PK.shape[1] + 1)])
            - other.mean()
            for other in (proxy_PK, gold_PK)
        )
        for name, proxy_PK in proxies(work, seed).items()
    }  # type: ignore[return-value]


if __name__ == "__main__":
    main()
