"""verl: `reward.custom_reward_function.path=pkg://plaudit.adapters.verl`, or `RewardManagerMixin`.

verl does not pass the prompt to a reward function: keep it in the column `extra_info` under `prompt` (a text or
messages), or use the mixin, which takes it from `raw_prompt` as verl's own discriminative reward models do.
"""

# verl may load this file by its path, outside of its package: imports are absolute here.
from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from plaudit._client import Client
from plaudit.adapters._rewards import async_client, conversation, ledger_of, logs, trainer
from plaudit.errors import ConfigurationError
from plaudit.types import Prompt

Extra = Mapping[str, Any] | None


@functools.cache
def _client(url: str | None) -> Client:
    return Client(url, **trainer())


async def _scored(url: str | None, max_length: int | None, prompt: Prompt, response: str) -> dict[str, float]:
    client, ledger = async_client(url), ledger_of("verl", url, max_length)
    if not ledger.compared:
        ledger.compare(await client.info())
    return logs(await client.score(prompt, response))


async def compute_score(
    data_source: str, solution_str: str, ground_truth: Any = None, extra_info: Extra = None, **options: Any
) -> dict[str, float]:
    """`score`, `tokens` and `truncated` of one response. Of the options, `url` (default: PLAUDIT_URL), `prompt_key` and
    `max_length` (the trainer's longest prompt and response, in tokens: compared with what the model reads) count; they
    come from `reward.custom_reward_function.reward_kwargs`. Calls made at the same time share requests.

    Raises PlauditError if there is no score. Not for the reward managers `limited`, which makes a failure the reward
    0.0, and `remote`, which takes no asynchronous function: see `compute_score_sync`.
    """
    how = options.get("url"), options.get("max_length")
    return await _scored(*how, _prompt(extra_info, options), solution_str)


def compute_score_sync(
    data_source: str, solution_str: str, ground_truth: Any = None, extra_info: Extra = None, **options: Any
) -> dict[str, float]:
    """`compute_score` for managers that take no asynchronous function."""
    client, ledger = _client(options.get("url")), ledger_of("verl", options.get("url"), options.get("max_length"))
    if not ledger.compared:
        ledger.compare(client.info())
    return logs(client.score(_prompt(extra_info, options), solution_str))


class RewardManagerMixin:
    """A discriminative reward model behind plaudit, as a reward manager: name it before verl's base class.

        class RewardManager(RewardManagerMixin, RewardManagerBase): ...

    The reward model's template is applied by the server, so the trainer needs no tokenizer of it.
    """

    config: Any
    loop: Any
    tokenizer: Any

    def __init__(self, **given: Any) -> None:
        """verl gives every manager what only those with a reward model of verl's own take, and not its base class."""
        known = inspect.signature(super().__init__).parameters
        super().__init__(**{name: value for name, value in given.items() if name in known})

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The reward of the last sequence of one sample, by its `raw_prompt` and its response's text."""
        sample = data[-1:][0]
        response = sample.batch["responses"]
        length = int(sample.batch["attention_mask"][-response.shape[-1] :].sum())
        decode = functools.partial(self.tokenizer.decode, response[:length], skip_special_tokens=True)
        text = await self.loop.run_in_executor(None, decode)
        prompt = conversation(sample.non_tensor_batch["raw_prompt"])
        lengths = self.config.data.max_prompt_length + self.config.data.max_response_length
        result = await _scored(None, lengths, prompt, text)
        return {"reward_score": result["score"], "reward_extra_info": result}


def _prompt(extra_info: Extra, options: Mapping[str, Any]) -> Prompt:
    key = options.get("prompt_key", "prompt")
    if extra_info is None or key not in extra_info:
        raise ConfigurationError(
            f"extra_info has no {key!r}: verl passes no prompt, so the data set needs one there (a text or messages); "
            "reward_kwargs.prompt_key names another key"
        )
    return conversation(extra_info[key])
