"""TRL: reward functions for `GRPOTrainer`, `RLOOTrainer` and their asynchronous kin.

    from plaudit.adapters.trl import AsyncReward

    trainer = GRPOTrainer(model=..., reward_funcs=AsyncReward("http://127.0.0.1:8000"), ...)

`Reward` blocks, `AsyncReward` runs beside other asynchronous reward functions. Both can be pickled, as trainers with
rollout processes need. Metrics appear as `<name>/failed`, `<name>/tokens`, ... where TRL passes `log_metric`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .._async_client import AsyncClient
from .._client import Client
from ..errors import ItemFailed
from ..types import Item, ItemError, OnError, ScoreResult, Scores, user
from ._rewards import Ledger, conversation, grouped, message, trainer
from .hacking import RewardHackingMonitor, Verdict

ItemOf = Callable[[Any, Any], Item | None]


def item_of(prompt: Any, completion: Any) -> Item | None:
    """The item to score for one prompt and completion of TRL, both of them texts or lists of messages.

    None if there is no response: a conversation that ends with a tool's turn. Raises InvalidInput for what a reward
    model's template would not see (tool calls, images): write your own function, and pass it as `item_of`.
    """
    turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    if not turns or turns[-1].get("role") != "assistant":
        return None
    response, told = [message(turn) for turn in turns], conversation(prompt)
    if len(response) == 1:
        return {"prompt": told, "response": response[0]["content"]}
    return {"messages": [*([user(told)] if isinstance(told, str) else told), *response]}


class _Reward:
    """What both reward functions are: a scorer, a name, and what is made of the scores.

    url         the server, or several; default: PLAUDIT_URL
    name        of its metrics; two reward functions of a trainer need two names
    on_error    `none`: a response that cannot be scored (too long, say) is None; `raise`: it ends the run. Left out:
                `none` where the trainer leaves such a response out of the step, `raise` where it would make it the
                reward 0 (`_makes_zero`). A server that is away is waited for until `timeout`, then raised, always
    max_length  the trainer's longest prompt and completion together, in tokens: compared with the model's own at the
                first call
    scorer      a client or an ensemble of your own, instead of `url` and `options`
    options     of the client: `timeout=None` for no limit, `overlong="truncate_prompt"`, `pin=False`, ...
    """

    _client: type[Client] | type[AsyncClient]

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        name: str = "plaudit",
        on_error: OnError | None = None,
        max_length: int | None = None,
        item_of: ItemOf = item_of,
        scorer: Any = None,
        **options: Any,
    ) -> None:
        self.__name__ = name
        self.ledger = Ledger(name, max_length)
        self._on_error = on_error
        self._item_of = item_of
        self.scorer: Any = scorer or self._client(url, **trainer(on_error=on_error or "none", **options))

    def _uncompared(self) -> Sequence[Any]:
        """The clients whose models have not been compared with the trainer's lengths."""
        return () if self.ledger.compared else getattr(self.scorer, "members", (self.scorer,))

    def _items(self, prompts: Sequence[Any], completions: Sequence[Any]) -> tuple[list[Item], list[int]]:
        """What is to be scored, and the places of what cannot be: no response is there."""
        found = [self._item_of(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        holes = [place for place, item in enumerate(found) if item is None]
        if holes and self._on_error == "raise":
            raise ItemFailed(f"completion {holes[0]} does not end with the assistant's turn", index=holes[0])
        return grouped([item for item in found if item is not None]), holes

    def _settle(self, scores: Scores, holes: list[int], columns: Mapping[str, Any]) -> list[float | None]:
        results = list(scores)
        for place in holes:
            error = ItemError("no_response", "the completion does not end with the assistant's turn")
            results.insert(place, ScoreResult(None, error=error))
        placed = (replace(result, index=index) for index, result in enumerate(results))
        settled = self.ledger.settle(replace(scores, results=tuple(placed)))
        if settled.failed and self._on_error is None and _makes_zero(columns):
            raise ItemFailed(
                f"{self.__name__}: {len(settled.failed)} of {len(settled)} responses have no score (see the log), and "
                "this trainer would make it the reward 0; try overlong='truncate_prompt', or on_error='none' for the 0",
                index=settled.failed[0].index,
                scores=settled,
            )
        if log_metric := columns.get("log_metric"):
            for key, value in self.ledger.metrics(settled).items():
                log_metric(key, value)
        if log_extra := columns.get("log_extra"):
            log_extra(f"{self.__name__}/revision", [None if r.score is None else settled.revision for r in settled])
        return settled.scores


def _makes_zero(columns: Mapping[str, Any]) -> bool:
    """Whether a None becomes the reward 0 with the trainer that passes these: any of TRL before 1.6, which sums what is
    there, and its online DPO, which does so still and has nothing to log with."""
    return _sums() or ("trainer_state" in columns and "log_metric" not in columns)


@functools.cache
def _sums() -> bool:
    try:
        return tuple(map(int, version("trl").split(".")[:2])) < (1, 6)
    except PackageNotFoundError:
        return False


class Reward(_Reward):
    """A reward function that blocks. Its `scorer` is a `Client` or an `Ensemble`."""

    _client = Client

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        items, holes = self._items(prompts, completions)
        for member in self._uncompared():
            self.ledger.compare(member.info())
        return self._settle(self.scorer.score_items(items), holes, columns)


class AsyncReward(_Reward):
    """A reward function to be awaited. Its `scorer` is an `AsyncClient` or an `AsyncEnsemble`."""

    _client = AsyncClient

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        items, holes = self._items(prompts, completions)
        for member in self._uncompared():
            self.ledger.compare(await member.info())
        return self._settle(await self.scorer.score_items(items), holes, columns)

    # Older trainers ask `inspect.iscoroutinefunction`, which looks at an object only if it is like a function.
    __code__ = __call__.__code__
    __defaults__ = None
    __kwdefaults__ = None


class HackingCallback:
    """A callback of transformers' `Trainer`: feeds what is logged to a monitor and ends the training on its word.

    `trainer.add_callback(HackingCallback(RewardHackingMonitor(HackingLimits(kl=20.0))))`. `name` is the reward
    function's, for the ensemble's `<name>/std`. `verdict` is the last one.
    """

    def __init__(self, monitor: RewardHackingMonitor | None = None, name: str = "plaudit") -> None:
        self.monitor = monitor or RewardHackingMonitor()
        self.name = name
        self.verdict = Verdict()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        found = logs or {}
        if "reward" not in found:
            return
        self.verdict = self.monitor.observe(
            reward=found["reward"],
            std=found.get(f"{self.name}/std"),
            length=found.get("completions/mean_length"),
            kl=found.get("kl"),
        )
        if self.verdict.stop:
            control.should_training_stop = True

    def __getattr__(self, event: str) -> Callable[..., None]:
        """Every other event of a trainer: nothing is done."""
        if not event.startswith("on_"):
            raise AttributeError(event)
        return lambda *args, **kwargs: None
