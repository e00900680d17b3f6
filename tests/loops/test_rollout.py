"""Sampling: what is sampled, with which log-probability, whatever the company."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from plaudit_loops.policy import Policy, Reference, load_policy
from plaudit_loops.rollout import draw, sample, uniforms

PROMPTS = ["a", "b c d e f", "g h a", "c c c c c c c c"]
KEYS = [(0, i) for i in range(16)]


@pytest.fixture(scope="module")
def policy(opinionated: Callable[[float], Policy]) -> Policy:
    return opinionated(8)


def encoded(policy: Policy, prompts: list[str]) -> list[list[int]]:
    return [policy.encode_prompt(prompt) for prompt in prompts]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_probabilities_are_those_of_a_teacher_forced_forward(policy: Policy, temperature: float) -> None:
    prompts = encoded(policy, PROMPTS)
    made = sample(policy, prompts, uniforms(3, "rollout", KEYS, 12), temperature=temperature)
    said = policy.say([(prompts[i // 4], r.ids) for i, r in enumerate(made)], temperature)
    assert {r.ended for r in made} == {True, False}
    for row, response in enumerate(made):
        ids = torch.tensor([[*prompts[row // 4], *response.ids]])
        with torch.no_grad():
            logps = (policy.module(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
        start = len(prompts[row // 4])
        alone = [float(logps[start + t - 1, token]) for t, token in enumerate(response.ids)]
        np.testing.assert_allclose(response.logprobs, alone, atol=2e-5)
        np.testing.assert_allclose(said.logprobs_BR[row, : len(alone)].tolist(), alone, atol=2e-5)
        probabilities = logps[start - 1 : -1].exp()
        entropy = [-sum(p * math.log(p) for p in row_ if p > 0) for row_ in probabilities.tolist()]
        np.testing.assert_allclose(said.entropy_BR[row, : len(alone)].tolist(), entropy, atol=2e-4)
    assert not said.logprobs_BR[~said.mask_BR].any()


def test_a_response_ends_with_its_first_end_token_and_no_other(policy: Policy) -> None:
    made = sample(policy, encoded(policy, PROMPTS), uniforms(3, "rollout", KEYS, 12), temperature=1.0)
    for response in made:
        ends = [i for i, token in enumerate(response.ids) if token in policy.stop_ids]
        assert ends == ([len(response.ids) - 1] if response.ended else [])
        assert response.ended or len(response.ids) == 12
        assert len(response.logprobs) == len(response.ids)
        assert "<end>" not in policy.decode(response.ids)


def test_what_is_sampled_does_not_depend_on_the_company(policy: Policy) -> None:
    prompts, noise = encoded(policy, PROMPTS), uniforms(3, "rollout", KEYS, 12)
    together = sample(policy, prompts, noise, temperature=1.0)
    alone = [r for i in range(4) for r in sample(policy, prompts[i : i + 1], noise[4 * i : 4 * i + 4], temperature=1.0)]
    assert [r.ids for r in alone] == [r.ids for r in together]


def test_other_seeds_streams_steps_and_samples_are_other_numbers() -> None:
    base = uniforms(0, "rollout", [(0, 0)], 4)
    others = [uniforms(1, "rollout", [(0, 0)], 4), uniforms(0, "reference", [(0, 0)], 4),
              uniforms(0, "rollout", [(1, 0)], 4), uniforms(0, "rollout", [(0, 1)], 4)]  # fmt: skip
    assert all((base != other).all() for other in others)
    assert (base == uniforms(0, "rollout", [(7, 7), (0, 0)], 4)[1]).all()


def test_tokens_come_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([[0.0, 1.0, float("-inf"), 2.0]]).repeat(40_000, 1)
    noise = torch.from_numpy(uniforms(0, "rollout", [(0, 0)], 40_000)[0])
    tokens, logprobs = draw(logits, noise, 0.5)
    expected = (logits[0] / 0.5).softmax(0)
    counts = torch.bincount(tokens, minlength=4) / len(tokens)
    assert counts[2] == 0
    torch.testing.assert_close(counts, expected, atol=0.01, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_the_reference_stays_when_the_policy_moves(tiny_policy_dir: Path) -> None:
    policy = load_policy(tiny_policy_dir, device="cpu", autocast=False)
    reference, pair = Reference(policy), [(policy.encode_prompt("a b"), (3, 4, 1))]
    before = policy.say(pair, 1.0).logprobs_BR.detach()
    with torch.no_grad():
        next(iter(policy.module.parameters())).add_(0.3)
    with torch.no_grad(), reference.module() as module:
        assert torch.equal(policy.say(pair, 1.0, module).logprobs_BR, before)
    assert not torch.equal(policy.say(pair, 1.0).logprobs_BR, before)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_other_families(family: str, write_base: Callable[[str], Path]) -> None:
    policy = load_policy(write_base(family), device="cpu", autocast=False)
    prompts = [policy.encode_prompt(p) for p in ("Human: what", "practise daily, read, and speak. " * 3)]
    made = sample(policy, prompts, uniforms(0, "rollout", KEYS[:4], 8), temperature=1.0)
    with torch.no_grad():
        said = policy.say([(prompts[i // 2], r.ids) for i, r in enumerate(made)], 1.0)
    for row, response in enumerate(made):
        np.testing.assert_allclose(said.logprobs_BR[row, : len(response.ids)].tolist(), response.logprobs, atol=1e-5)


def test_dropout_is_off_in_a_policy_that_has_some(write_base: Callable[[str], Path], tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(write_base("llama"), tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text()) | {"attention_dropout": 0.5}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    policy = load_policy(tmp_path / "base", device="cpu", autocast=False)
    policy.module.train()
    pair = [(policy.encode_prompt("Human: what"), (9, 10, 2))]
    assert torch.equal(policy.say(pair, 1.0).logprobs_BR, policy.say(pair, 1.0).logprobs_BR)
