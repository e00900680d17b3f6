"""The adapters, called as the trainers call them. The call sites are quoted from the versions named beside them."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import inspect
import logging
import math
import threading
from collections.abc import Coroutine, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from plaudit import AsyncClient, AsyncEnsemble, Client, Ensemble, RetryPolicy, errors
from plaudit._base import BaseClient
from plaudit.adapters import openrlhf, slime, trl, verl
from plaudit.adapters._rewards import async_client, ledger_of, longest, trainer
from plaudit.adapters.trl import AsyncReward, Reward, item_of
from plaudit.types import Identity, ServerInfo

if TYPE_CHECKING:
    from conftest import WireServer

QUESTION = [{"role": "user", "content": "What is 2+2?"}]
FAST = RetryPolicy(retries=2, base=0.01)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def call_trl(reward: Any, prompts: list[Any], completions: list[Any], **columns: Any) -> Any:
    """`GRPOTrainer._calculate_rewards` of TRL 1.16: keyword arguments only, every column of the data set, the
    trainer's state, the two loggers; asynchronous ones are gathered on a loop of their own."""
    kwargs = {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": [[1, 2, 3]] * len(prompts),
        "answer": ["4"] * len(prompts),
        "trainer_state": SimpleNamespace(global_step=1),
        **columns,
    }
    if not inspect.iscoroutinefunction(reward):
        return reward(**kwargs)

    async def gather() -> Any:
        return (await asyncio.gather(reward(**kwargs)))[0]

    return run(gather())


LOOP = asyncio.new_event_loop()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """As trainers do: on a loop that another thread runs, as long as the process lives."""
    return asyncio.run_coroutine_threadsafe(work, LOOP).result()


@pytest.fixture(scope="module", autouse=True)
def running_loop() -> Iterator[None]:
    thread = threading.Thread(target=LOOP.run_forever, daemon=True)
    thread.start()
    yield
    LOOP.call_soon_threadsafe(LOOP.stop)
    thread.join()
    LOOP.close()


@pytest.fixture(autouse=True)
def closed_clients(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Reward functions are made once and never closed, here they are; and no test knows another's clients."""
    made: list[Any] = []
    set_up = BaseClient.__setstate__

    def recorded(self: Any, settings: Any) -> None:
        made.append(self)
        set_up(self, settings)

    monkeypatch.setattr(BaseClient, "__setstate__", recorded)
    caplog.set_level(logging.WARNING, "plaudit")
    for cached in (verl._client, async_client, ledger_of):
        cached.cache_clear()
    yield
    for client in made:
        if isinstance(client, AsyncClient):
            run(client.aclose())
        else:
            client.close()


@pytest.fixture(params=[Reward, AsyncReward])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_trl_scores_plain_and_conversational_prompts(server: WireServer, kind: Any) -> None:
    texts = [f"answer {n}" for n in range(8)]
    expected = [server.score_of("What is 2+2?", text) for text in texts]
    assert call_trl(kind(server.url), ["What is 2+2?"] * 8, texts) == expected
    assert call_trl(kind(server.url), [QUESTION] * 8, [said(text) for text in texts]) == expected
    body = server.seen[-1].body
    assert body is not None and body["items"] == [{"prompt": QUESTION, "responses": texts}], "the prompt travels once"
    assert body["priority"] == "batch"


def test_trl_scores_keep_the_order_of_mixed_prompts(server: WireServer, kind: Any) -> None:
    prompts = ["a", "a", "b", "a", "b", "b"]
    texts = [str(n) for n in range(6)]
    expected = [server.score_of(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    assert call_trl(kind(server.url), prompts, texts) == expected


def test_trl_conversations_with_several_turns_are_scored_whole(server: WireServer, kind: Any) -> None:
    turns = [*said("let me see"), {"role": "user", "content": "go on"}, *said("4")]
    assert call_trl(kind(server.url), [QUESTION], [turns]) == [server.score_of([*QUESTION, *turns[:-1]], "4")]


def test_trl_what_cannot_be_scored_is_none_and_said(
    server: WireServer, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    metrics: dict[str, float] = {}
    extra: dict[str, list[Any]] = {}
    cut = [*said("calling"), {"role": "tool", "content": "?"}]
    completions = [said("a"), said("POISON"), cut, said("b")]
    rewards = call_trl(
        kind(server.url, name="helpful"),
        [QUESTION] * 4,
        completions,
        log_metric=lambda name, value: metrics.update({name: value}),
        log_extra=lambda name, values: extra.update({name: values}),
    )
    assert rewards == [server.score_of(QUESTION, "a"), None, None, server.score_of(QUESTION, "b")]
    assert metrics == {
        "helpful/failed": 0.5,
        "helpful/truncated": 0.0,
        "helpful/revision_changes": 0.0,
        "helpful/tokens": 4.0,
    }
    assert extra == {"helpful/revision": ["rev1", None, None, "rev1"]}
    assert "helpful: 2 of 4 responses have no score, the first: too_long" in caplog.text
    for bad in (said("POISON"), cut):
        with pytest.raises(errors.ItemFailed):
            call_trl(kind(server.url, on_error="raise"), [QUESTION], [bad])
    assert call_trl(kind(server.url), [QUESTION], [cut], log_metric=print) == [None]


def test_trl_where_no_score_would_be_the_reward_0_it_ends_the_run(
    server: WireServer, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`OnlineDPOTrainer._calculate_rewards_from_functions` of TRL 1.16 sums what is there, as GRPO did before 1.6."""
    bad, logging = ([QUESTION] * 2, [said("a"), said("POISON")]), {"log_metric": lambda name, value: None}
    with pytest.raises(errors.ItemFailed, match=r"1 of 2 .* the reward 0") as failure:
        call_trl(kind(server.url), *bad)
    assert failure.value.index == 1 and failure.value.scores is not None and failure.value.scores.scores[1] is None
    assert call_trl(kind(server.url, on_error="none"), *bad)[1] is None, "who asks for it gets it"
    for installed, safe in (("1.5.2", False), ("1.6.0", True), ("1.16.0", True)):
        (metadata := tmp_path / installed / f"trl-{installed}.dist-info").mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {installed}\n")
        trl._sums.cache_clear()
        with monkeypatch.context() as environment:
            environment.syspath_prepend(metadata.parent)
            if safe:
                assert call_trl(kind(server.url), *bad, **logging)[1] is None
            else:
                with pytest.raises(errors.ItemFailed):
                    call_trl(kind(server.url), *bad, **logging)
    trl._sums.cache_clear()


def test_trl_a_server_that_is_away_is_no_reward(server: WireServer, kind: Any) -> None:
    server.fail(*[{"status": 503, "body": {"error": {"code": "draining", "message": "x", "retryable": True}}}] * 9)
    with pytest.raises(errors.Unavailable, match="draining"):
        call_trl(kind(server.url, retry=FAST), ["p"] * 2, ["a", "b"])
    assert trainer()["retry"].retries is None, "by default it is waited for as long as the timeout allows"


def test_a_trainers_patience_comes_from_the_environment_where_it_is_told_in_no_other_way(
    server: WireServer, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLAUDIT_URL", server.url)
    for told, seconds in (("", 600), ("7200", 7200), ("0", None)):
        monkeypatch.setenv("PLAUDIT_TIMEOUT", told)
        clients = [kind(server.url).scorer, loaded(openrlhf)._client(), *(make.__wrapped__(None) for make in
                   (async_client, verl._client))]  # fmt: skip
        assert [client.settings.timeout for client in clients] == [seconds] * 4
    assert kind(server.url, timeout=5.0).scorer.settings.timeout == 5.0, "what is told goes before it"
    monkeypatch.setenv("PLAUDIT_TIMEOUT", "1h")
    with pytest.raises(errors.ConfigurationError, match="PLAUDIT_TIMEOUT must be a number of seconds, 0 for no limit"):
        kind(server.url)


def test_trl_the_revision_is_pinned_or_its_change_shows(
    server: WireServer, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    metrics: dict[str, float] = {}
    pinned, loose = kind(server.url), kind(server.url, pin=False, name="loose")
    for reward in (pinned, loose):
        call_trl(reward, ["p"], ["a"], log_metric=metrics.__setitem__)
    server.identity["revision"] = "rev2"
    with pytest.raises(errors.RevisionChanged):
        call_trl(pinned, ["p"], ["a"])
    call_trl(loose, ["p"], ["a"], log_metric=metrics.__setitem__)
    assert metrics["loose/revision_changes"] == 1.0 and "loose: the reward model is now" in caplog.text


def test_trl_says_once_that_the_trainer_writes_more_than_the_model_reads(
    server: WireServer, kind: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = server._answer
    monkeypatch.setattr(server, "_answer", lambda seen: _with_length(answer(seen), 512))
    reward = kind(server.url, max_length=513)
    for _ in range(2):
        call_trl(reward, ["p"], ["a"])
    assert [record.message for record in caplog.records if "513 tokens, but tiny reads at most 512" in record.message]
    assert server.paths() == ["/info", "/score", "/score"]
    caplog.clear()
    call_trl(kind(server.url, max_length=512), ["p"], ["a"])
    assert caplog.records == []


def _with_length(answered: tuple[int, Any], length: int) -> tuple[int, Any]:
    status, answer = answered
    return status, {**answer, "max_length": length} if "limits" in answer else answer


def test_the_length_is_that_of_the_model_which_is_asked() -> None:
    models = [{"revision": "r1", "max_length": 7}, {"revision": "r2", "max_length": 9}]
    info = ServerInfo(Identity("m", "r2", "n"), 1, 1, {"models": models, "max_length": 7})
    assert longest(info) == 9
    assert longest(ServerInfo(Identity("m", "r2", "n"), 1, 1, {})) is None


def test_trl_reward_functions_have_names_and_cross_processes(server: WireServer, kind: Any) -> None:
    reward = kind(server.url, name="safety")
    assert reward.__name__ == "safety"
    assert inspect.iscoroutinefunction(reward) is (kind is AsyncReward), "older trainers ask this of the object"
    assert inspect.iscoroutinefunction(reward.__call__) is (kind is AsyncReward)
    twin = copy.deepcopy(reward)
    assert twin.__name__ == "safety" and call_trl(twin, ["p"], ["a"]) == [server.score_of("p", "a")]


def test_trl_takes_an_ensemble_and_logs_what_it_disputes(server: WireServer, twin: WireServer, kind: Any) -> None:
    metrics: dict[str, float] = {}
    client, ensemble = (Client, Ensemble) if kind is Reward else (AsyncClient, AsyncEnsemble)
    scorer = ensemble([client(server.url), client(twin.url)], "mean-std")  # type: ignore[operator]
    reward = kind(scorer=scorer, max_length=8)
    assert call_trl(reward, ["p"], ["a"], log_metric=metrics.__setitem__) == [server.score_of("p", "a")]
    assert metrics["plaudit/std"] == 0.0 and "/info" in twin.paths()


def test_trl_nothing_of_a_turn_is_left_out_in_silence() -> None:
    parts = [{"type": "text", "text": "4"}, {"type": "text", "text": "!"}]
    assert item_of(QUESTION, [{"role": "assistant", "content": parts, "name": None}]) == {
        "prompt": QUESTION,
        "response": "4!",
    }
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    for prompt, completion, what in (
        (QUESTION, [called, *said("x")], "tool_calls"),
        ([{"role": "user", "content": [{"type": "image"}]}], said("x"), "content of type list"),
    ):
        with pytest.raises(errors.InvalidInput, match=what):
            item_of(prompt, completion)
    own = Reward("http://h", item_of=lambda prompt, completion: {"text": prompt + completion})
    assert own._items(["p"], ["c"]) == ([{"text": "pc"}], [])


def test_openrlhf_function_file(server: WireServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`SingleTurnAgentExecutor` of OpenRLHF 0.11.2: the file is loaded by its path and called with lists of one."""
    module = loaded(openrlhf)
    monkeypatch.setenv("PLAUDIT_URL", server.url)
    given = run(asyncio.to_thread(module.reward_func, ["<u>hi<a>hello</s>"], ["<u>hi<a>"], [None]))
    score = server.score_of("", "<u>hi<a>hello</s>")
    assert given == {"rewards": [score], "scores": [score], "extra_logs": {"tokens": [20.0], "truncated": [0.0]}}
    assert server.seen[-1].body is not None and server.seen[-1].body["overlong"] == "truncate_left"
    with pytest.raises(errors.ItemFailed, match="tokens too many"):
        module.reward_func(["POISON"], [""], [""])
    assert module.reward_func([], [], [])["rewards"] == []


@pytest.mark.parametrize("prompt", ["What is 2+2?", QUESTION, tuple(QUESTION)])
def test_verl_compute_score(server: WireServer, prompt: Any) -> None:
    """`NaiveRewardManager.run_single` of verl 0.9.1: keyword arguments through a partial, `reward_kwargs` merged."""

    async def call_with_kwargs_async(raw: Any, extra: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return await raw(*args, **{**kwargs, **extra})

    extra_info = {"prompt": prompt, "num_turns": 1, "rollout_reward_scores": {}, "index": 0}
    call = {"data_source": "d", "solution_str": "4", "ground_truth": "4", "extra_info": extra_info}
    compute = partial(call_with_kwargs_async, verl.compute_score, {"url": server.url})
    assert inspect.iscoroutinefunction(compute)

    async def calls() -> Any:
        return await asyncio.gather(*(compute(**{**call, "solution_str": str(n)}) for n in range(40)))

    expected = [server.score_of(prompt, str(n)) for n in range(40)]
    results = run(calls())
    assert [result["score"] for result in results] == expected and len(server.seen) == 1
    assert all(result.keys() == {"score", "tokens", "truncated"} for result in results)
    passed = {"reward_router_address": "h:1", "reward_model_tokenizer": None}
    assert verl.compute_score_sync(**call, **passed, url=server.url)["score"] == server.score_of(prompt, "4")


def test_every_adapter_says_once_that_the_trainer_writes_more_than_the_model_reads(
    server: WireServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "_answer", partial(_reading, server._answer, 64))
    monkeypatch.setenv("PLAUDIT_URL", server.url)
    monkeypatch.setenv("PLAUDIT_MAX_LENGTH", "65")
    call: dict[str, Any] = {"extra_info": {"prompt": "p"}, "max_length": 65}
    slime_args = SimpleNamespace(rm_url=server.url, rollout_max_context_len=65)
    reward_file = loaded(openrlhf)
    for name, calls in {
        "verl": lambda: [verl.compute_score_sync("d", "a", **call) for _ in range(2)],
        "openrlhf": lambda: [reward_file.reward_func(["a"], [""], [None]) for _ in range(2)],
        "slime": lambda: [run(slime.reward(slime_args, sample_of("p", "a"))) for _ in range(2)],
    }.items():
        caplog.clear()
        calls()
        assert caplog.text.count(f"{name}: the trainer's prompts and responses have up to 65 tokens") == 1
    ledger_of.cache_clear()
    caplog.clear()
    run(verl.compute_score("d", "a", **{**call, "max_length": 64}))
    assert not caplog.text
    reward_file._client().close()
    monkeypatch.setenv("PLAUDIT_MAX_LENGTH", "long")
    with pytest.raises(errors.ConfigurationError, match="must be a number of tokens"):
        loaded(openrlhf)


def _reading(answer: Any, length: int, seen: Any) -> Any:
    """The answer of a server that says how long its model reads."""
    status, body = answer(seen)
    return status, {**body, "max_length": length} if seen.path == "/info" else body


def loaded(module: Any) -> Any:
    """A function file as its trainer loads it: by its path."""
    spec = importlib.util.spec_from_file_location("reward_func", module.__file__)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_verl_without_a_prompt_says_which_column_is_missing() -> None:
    for extra_info in (None, {"index": 0}):
        with pytest.raises(errors.ConfigurationError, match="extra_info has no 'question'"):
            verl.compute_score_sync("d", "4", "4", extra_info, url="http://h", prompt_key="question")


def test_verl_a_failure_is_raised_never_a_number(server: WireServer) -> None:
    with pytest.raises(errors.ItemFailed):
        verl.compute_score_sync("d", "POISON", None, {"prompt": "p"}, url=server.url)


class Row(list[int]):
    """As much of a tensor as verl's samples need."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self),)

    def sum(self) -> int:
        return sum(self)

    def __getitem__(self, key: Any) -> Any:
        return Row(super().__getitem__(key)) if isinstance(key, slice) else super().__getitem__(key)


def test_verl_reward_manager_takes_the_prompt_from_the_rollout(
    server: WireServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_reward_manager` and `RewardLoopWorker.compute_score_disrm` of verl 0.9.1: arguments that the base class
    does not take, `raw_prompt`, and the response without its padding."""

    class Base:
        def __init__(self, config: Any, tokenizer: Any, compute_score: Any) -> None:
            self.loop = asyncio.get_running_loop()
            self.config, self.tokenizer, self.compute_score = config, tokenizer, compute_score

    class Manager(verl.RewardManagerMixin, Base): ...

    sample = SimpleNamespace(
        batch={"responses": Row([52, 33, 0, 0]), "attention_mask": Row([0, 1, 1, 1, 1, 0, 0])},
        non_tensor_batch={"raw_prompt": QUESTION},
    )
    monkeypatch.setenv("PLAUDIT_URL", server.url)
    config = SimpleNamespace(data=SimpleNamespace(max_prompt_length=3, max_response_length=4))
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(map(chr, ids)))
    of_the_worker = {"reward_router_address": None, "reward_model_tokenizer": None}

    async def calls() -> Any:
        manager = Manager(config=config, tokenizer=tokenizer, compute_score=print, **of_the_worker)
        return await manager.run_single([sample])

    result = run(calls())
    assert result["reward_score"] == server.score_of(QUESTION, "4!")
    assert result["reward_extra_info"] == {"score": result["reward_score"], "tokens": 5.0, "truncated": 0.0}


def sample_of(prompt: Any, response: str) -> Any:
    return SimpleNamespace(prompt=prompt, response=response, label=None, metadata={})


def test_slime_scores_a_sample_and_a_group(server: WireServer) -> None:
    """`async_rm` and `batched_async_rm` of slime: one sample, or (`--group-rm`) the list of them."""
    args = SimpleNamespace(rm_url=server.url, reward_key=None, eval_reward_key=None, apply_chat_template=False)
    group = [sample_of(QUESTION, str(n)) for n in range(8)]
    expected = [server.score_of(QUESTION, str(n)) for n in range(8)]

    async def calls() -> Any:
        return await asyncio.gather(*(slime.reward(args, one) for one in group)), await slime.reward(args, group)

    singles, together = run(calls())
    assert singles == together == expected and len(server.seen) == 2
    args.reward_key = "helpful"
    assert run(slime.reward(args, group[0])) == {
        "score": expected[0],
        "tokens": 4.0,
        "truncated": 0.0,
        "helpful": expected[0],
    }


def test_slime_rendered_prompts_stay_as_they_are(server: WireServer, caplog: pytest.LogCaptureFixture) -> None:
    args = SimpleNamespace(rm_url=server.url, apply_chat_template=True, rollout_max_response_len=99)
    assert run(slime.reward(args, sample_of("<u>hi<a>", "4"))) == server.score_of("", "<u>hi<a>4")
    assert server.paths() == ["/info", "/score"] and server.seen[-1].body is not None
    assert server.seen[-1].body["items"] == [{"text": "<u>hi<a>4"}]


def test_slime_a_failure_is_raised_never_a_number(server: WireServer) -> None:
    args = SimpleNamespace(rm_url=server.url)
    for samples in (sample_of("p", "POISON"), [sample_of("p", "a"), sample_of("p", "POISON")]):
        with pytest.raises(errors.ItemFailed):
            run(slime.reward(args, samples))


def test_numbers_that_a_trainer_logs_are_never_missing() -> None:
    from plaudit.adapters._rewards import logs
    from plaudit.types import ScoreResult

    assert math.isnan(logs(ScoreResult(1.0))["tokens"])
