"""`report.html`: how a run goes, as one page that needs nothing but itself. It is drawn anew with every checkpoint."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plaudit_model.charts import Series, chart, page, table
from plaudit_model.json_lines import write_whole

PAGE = "report.html"
# What is read first stands first: scores rise, KL stays under its budget, responses do not grow. A band is the
# deviation over a step's responses, a dashed line a limit of the configuration.
_CHARTS = {
    "Score of the reward model": ("objective/scores",), "KL to the starting policy, nats": ("objective/kl",),
    "Tokens of a response": ("val/length",), "Entropy of a token, nats": ("objective/entropy",),
    "Share of tokens that are clipped": ("policy/clipfrac_avg", "val/clipfrac_avg"),
    "Responses: shares": ("val/truncated", "val/used", "val/distinct_2"), "Value loss": ("loss/value_avg",),
    "Explained variance of returns": ("val/explained_variance",), "Weight of the KL": ("objective/kl_coef",),
    "Loss": ("loss",), "Accuracy": ("accuracy",), "Implicit rewards": ("rewards/chosen", "rewards/rejected"),
    "Gradient norm before clipping": ("grad_norm",), "Learning rate": ("learning_rate",),
}  # fmt: skip
_LIMITS = {"objective/kl": "kl.kl_budget", "val/length": "rollout.max_new_tokens"}


def write(out: Path, settings: Mapping[str, Any], taken: str) -> None:
    """Draw what is in `<out>/metrics.jsonl` and `samples.jsonl`. A page that cannot be written is a warning."""
    try:
        lines = [(out / name).read_text(encoding="utf-8").splitlines() for name in ("metrics.jsonl", "samples.jsonl")]
        events, samples = ([*map(json.loads, some)] for some in (lines[0], lines[1][:-13:-1]))  # twelve, newest first
        drawn = ((title, list(_series(events, names, settings))) for title, names in _CHARTS.items())
        charts = "".join(chart(series, title, "step") for title, series in drawn if series)
        last = table(("step", "score", "prompt", "response"), map(_sample, samples)) if samples else ""
        told = f"<details><summary>configuration</summary>{table((), settings.items())}</details>"
        parts = table((), [("steps", taken)]), f"<div class='charts'>{charts}</div>", "<h2>samples</h2>" * bool(last)
        write_whole(out / PAGE, page(f"plaudit: {out}", *parts, last, told))
    except Exception as error:  # a page must not cost a run
        logging.getLogger("plaudit.loops").warning("%s could not be written: %s", out / PAGE, error)


def _sample(row: Mapping[str, Any]) -> tuple[object, ...]:
    scores = ("-" if score is None else f"{score:.3f}" for score in row["scores"])
    return row["step"], ", ".join(scores), row["prompt"], row["response"]


def _series(events: Sequence[Mapping[str, Any]], names: Sequence[str], settings: Mapping[str, Any]) -> Iterator[Series]:
    """The columns that the run has, and their limits."""

    def column(name: str) -> list[float]:
        return [math.nan if event.get(name) is None else event[name] for event in events]

    steps = column("step")
    for name in names:
        values, spread = column(name), column(f"{name}_std")
        if any(map(math.isfinite, values)):
            ends = [[y + side * s for y, s in zip(values, spread, strict=True)] for side in (-1, 1)]
            yield Series(name, steps, values, *(ends if any(map(math.isfinite, spread)) else ()))
            if limit := settings.get(_LIMITS.get(name, "")):
                yield Series(_LIMITS[name], [steps[0], steps[-1]], [limit, limit], style="dashed")
