"""The schedule against its definition, the parameter groups, and AdamW's state there and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from plaudit_model import optimiser
from plaudit_model.reward_model import RewardModel
from plaudit_training import optim
from plaudit_training.config import OptimConfig

WriteBase = Callable[[str], Path]
CONFIG = OptimConfig(learning_rate=1e-2, head_learning_rate=5e-2, weight_decay=0.1, batch_pairs=8)


def scales(total: int, warmup: float = 0.03, floor: float = 0.1) -> list[float]:
    return [optim.lr_scale(step, total, warmup, floor) for step in range(total)]


def test_the_rate_rises_in_a_line_then_falls_by_half_a_cosine_to_its_floor() -> None:
    factors = scales(200)
    assert factors[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    middle = 6 + 97 - 1
    assert factors[middle] == pytest.approx(0.55), "half-way down the cosine"
    assert factors[-1] == pytest.approx(0.1)
    assert factors[5:] == sorted(factors[5:], reverse=True)


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_a_short_run_has_a_rate_in_every_step(total: int) -> None:
    assert all(0 < factor <= 1 for factor in scales(total))


def test_no_warm_up_begins_at_the_top() -> None:
    assert scales(1000, warmup=0.0)[0] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_norms_and_biases_are_free_of_decay_and_the_head_has_its_own_rate(write_base: WriteBase, family: str) -> None:
    module = RewardModel.from_base(write_base(family), seed=0, device="cpu").module
    optimizer = optim.build(module, CONFIG)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            assert (group["weight_decay"] == 0) == (parameter.ndim < 2 or "norm" in name.lower()), name
            assert group["peak"] == (5e-2 if name.startswith(("score", "classifier")) else 1e-2), name
    assert not names, "every parameter is in exactly one group"


def test_the_head_shares_the_rate_unless_it_is_given_one(write_base: WriteBase) -> None:
    module = RewardModel.from_base(write_base("qwen3"), seed=0, device="cpu").module
    optimizer = optim.build(module, replace(CONFIG, head_learning_rate=None))
    assert {group["peak"] for group in optimizer.param_groups} == {1e-2}


def test_each_group_scales_its_own_rate() -> None:
    optimizer = optim.build(Toy(), CONFIG)
    optimiser.set_rate(optimizer, 0.5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [5e-3, 2.5e-2]


class Toy(nn.Module):
    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 3)
        self.score = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.score(self.body(x))
        return scores


def some_steps(module: Toy, optimizer: torch.optim.Optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        optimizer.zero_grad()
        module(torch.randn(4, 3, generator=generator)).square().sum().backward()
        optimizer.step()


def test_the_optimiser_goes_on_where_its_tensors_were_taken() -> None:
    torch.manual_seed(0)
    module = Toy()
    optimizer = optim.build(module, CONFIG)
    some_steps(module, optimizer, 3)
    saved = {name: tensor.clone() for name, tensor in optimiser.moments(optimiser.trained(module), optimizer).items()}
    moments = ("step", "exp_avg", "exp_avg_sq")
    assert set(saved) == {f"{name}/{moment}" for name, _ in module.named_parameters() for moment in moments}
    twin = Toy()
    twin.load_state_dict(module.state_dict())
    other = optim.build(twin, CONFIG)
    optimiser.load_moments(optimiser.trained(twin), other, saved)
    for one, its_optimizer in ((module, optimizer), (twin, other)):
        some_steps(one, its_optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    fresh = Toy()
    fresh.load_state_dict(twin.state_dict())
    forgetful = optim.build(fresh, CONFIG)
    some_steps(fresh, forgetful, 2)
    some_steps(twin, other, 2)
    assert not torch.equal(fresh.score.weight, twin.score.weight), "moments matter"


@pytest.mark.parametrize("limit", [0.5, 0.0])
def test_gradients_are_clipped_to_the_norm_or_left(limit: float) -> None:
    module = Toy()
    module(torch.ones(2, 3)).sum().backward()
    before = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    norm = optim.clip(module, limit)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in before)), rel=1e-5)
    after = [p.grad for p in module.parameters() if p.grad is not None]
    factor = limit / norm if limit else 1.0
    assert all(torch.allclose(b * factor, a, rtol=1e-4) for a, b in zip(after, before, strict=True))


def test_a_gradient_that_is_not_finite_shows_in_the_norm() -> None:
    module = Toy()
    (module(torch.ones(2, 3)).sum() * float("inf")).backward()
    assert not math.isfinite(optim.clip(module, 1.0))
