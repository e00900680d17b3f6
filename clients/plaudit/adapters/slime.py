"""slime: `--custom-rm-path plaudit.adapters.slime.reward --rm-url http://127.0.0.1:8000`.

With `--group-rm` a prompt's samples travel together; without it, samples that finish at the same time do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..types import Item, ScoreResult
from ._rewards import async_client, conversation, ledger_of, logs

Reward = float | dict[str, float]


async def reward(args: Any, samples: Any, **_: Any) -> Reward | list[Reward]:
    """The reward of a sample, or of each of a list of samples: a number or, where `--reward-key` (or
    `--eval-reward-key`) is set, a dict with `score`, `tokens` and `truncated`, the score under those keys too.

    `--rm-url` names the server, else PLAUDIT_URL. Raises PlauditError if one has no score.
    """
    url = getattr(args, "rm_url", None) or None
    client, ledger = async_client(url), ledger_of("slime", url, _longest(args))
    if not ledger.compared:
        ledger.compare(await client.info())
    if not isinstance(samples, Sequence):
        return _reward(args, await client.score_item(_item(args, samples)))
    scores = ledger.settle(await client.score_items([_item(args, sample) for sample in samples]))
    return [_reward(args, result) for result in scores]


def _item(args: Any, sample: Any) -> Item:
    """A prompt that is a text was rendered by the policy's template if the trainer applies it."""
    if isinstance(sample.prompt, str) and getattr(args, "apply_chat_template", False):
        return {"text": sample.prompt + sample.response}
    return {"prompt": conversation(sample.prompt), "response": sample.response}


def _reward(args: Any, result: ScoreResult) -> Reward:
    keys = [key for key in (getattr(args, "reward_key", None), getattr(args, "eval_reward_key", None)) if key]
    found = logs(result)
    return {**found, **dict.fromkeys(keys, found["score"])} if keys else found["score"]


def _longest(args: Any) -> int | None:
    whole = getattr(args, "rollout_max_context_len", None)
    parts = [getattr(args, name, None) or 0 for name in ("rollout_max_prompt_len", "rollout_max_response_len")]
    return whole or sum(parts) or None
