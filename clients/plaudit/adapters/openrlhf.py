"""OpenRLHF: `--reward.remote_url` with the path of this file (it needs none of it to call `/get_reward` directly).

Over the route it adds: a server that restarts is waited for (the trainer's own client gives up after five seconds and
leaves the reward out), several servers, one revision for the whole run. Set PLAUDIT_URL for the trainer's processes,
and PLAUDIT_MAX_LENGTH to its longest prompt and response, in tokens, to be warned if the model reads less.
"""

# The trainer loads this file by its path, outside of its package: imports are absolute here.
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from plaudit._client import Client
from plaudit._settings import environment_length
from plaudit.adapters._rewards import Ledger, logs, trainer


@functools.cache
def _client() -> Client:
    return Client(**trainer(on_error="none", overlong="truncate_left"))


_LEDGER = Ledger("openrlhf", environment_length())


def reward_func(queries: Sequence[str], prompts: Sequence[Any], labels: Sequence[Any]) -> dict[str, Any]:
    """The rewards of `queries`: prompts and responses as the policy's template has rendered them, special tokens
    included. (A server whose model has another template needs `--rendered-text rerender`.)

    Raises PlauditError if one has no score: the trainer logs that and leaves the sample out.
    """
    if not _LEDGER.compared:
        _LEDGER.compare(_client().info())
    rows = [logs(result) for result in _LEDGER.settle(_client().score_items([{"text": query} for query in queries]))]
    rewards = [row["score"] for row in rows]
    logged = {key: [row[key] for row in rows] for key in ("tokens", "truncated")}
    return {"rewards": rewards, "scores": rewards, "extra_logs": logged}
