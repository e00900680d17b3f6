"""Architectures that run through transformers' own module: which path they take and why, and what the proof sees."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, masking_utils

from plaudit_model.encode import Encoded
from plaudit_model.module_trunk import ModuleTrunk, Unpackable, window_of
from plaudit_model.oracle import agreement
from plaudit_model.padded_trunk import split_by_length
from plaudit_model.reward_model import RewardModel

ModelDir = Callable[[str], Path]


def items(count: int = 8, seed: int = 0, longest: int = 90) -> list[Encoded]:
    generator = np.random.default_rng(seed)
    prompt = generator.integers(3, 600, 40, dtype=np.int32)
    own = [generator.integers(3, 600, int(n), dtype=np.int32) for n in generator.integers(1, longest, count)]
    return [Encoded(np.concatenate([prompt, ids]), 40) for ids in own]


def eager(directory: Path) -> Any:
    """The module as transformers loads it."""
    return AutoModelForSequenceClassification.from_pretrained(directory, attn_implementation="eager")


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("olmo2", "packed: transformers' layers with our attention, prompts shared"),
        ("electra", "packed: transformers' layers with our attention"),
        ("gpt_oss", "padded: its attention takes s_aux"),
        ("deberta-v2", "padded: deberta-v2 does not ask transformers' attention interface"),
    ],
)
def test_the_path_and_its_reason(reward_model_dir: ModelDir, family: str, reason: str) -> None:
    model = RewardModel.load(reward_model_dir(family))
    assert model.path_reason.split("; ")[0] == reason
    assert model.shares_prompt == ("shared" in reason)
    assert ("-padded" in model.numerics) == reason.startswith("padded")
    plugged = model.module.config._attn_implementation == "plaudit"
    assert plugged == reason.startswith("packed"), "a padded module has its own attention back"


def test_a_recurrence_is_seen_and_padded(reward_model_dir: ModelDir) -> None:
    """Jamba's state-space layers carry one sequence into the next."""
    model = RewardModel.load(reward_model_dir("jamba"))
    assert model.trunk.reason.startswith("padded: when packed, scores move with the batch by 0.")
    assert model.sharing == "n/a: padded"
    assert {type(layer.forward).__name__ for layer in model.module.modules() if type(layer) is torch.nn.Linear} == {
        "method"
    }, "products are the module's own again"


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_leak_between_neighbours_is_seen(
    reward_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch, mode: str, dtype: str
) -> None:
    """A hundredth of the token before, far below the tolerance that tells bf16's rounding from wiring."""
    from transformers.models.olmo2.modeling_olmo2 import Olmo2MLP

    own = Olmo2MLP.forward
    monkeypatch.setattr(Olmo2MLP, "forward", lambda self, x: own(self, x + 0.01 * pad(x[:, :-1], (0, 0, 1, 0))))
    model = RewardModel.load(reward_model_dir("olmo2"), mode=mode, dtype=dtype)
    assert model.trunk.reason.startswith("padded: when packed, scores ")


def test_dropout_of_weights_is_off_whatever_it_is_called(reward_model_dir: ModelDir) -> None:
    model = RewardModel.from_base(reward_model_dir("mixtral"), seed=0)
    assert isinstance(model.trunk, ModuleTrunk), "training takes the path that serving takes"
    model.train_mode()
    assert model.module.config.router_jitter_noise == 0
    assert np.array_equal(model.score_encoded(items()), model.score_encoded(items()))


class Largest(TorchDispatchMode):
    """The most elements that a tensor had."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("family", ["starcoder2", "electra"])
def test_no_mask_over_all_pairs_of_rows_is_built(reward_model_dir: ModelDir, family: str) -> None:
    model = RewardModel.load(reward_model_dir(family))
    assert isinstance(model.trunk, ModuleTrunk)
    many = items(64, longest=60)
    rows = sum(len(item.ids) - (40 if model.shares_prompt else 0) for item in many)
    with Largest() as largest:
        model.score_encoded(many, token_budget=1 << 20)
    assert rows > 1500 and largest.elements < rows * 400 < rows * rows


def test_a_plugged_module_is_still_a_module(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    """Called directly it computes what it always did, and nothing of ours is written with it."""
    model = RewardModel.load(reward_model_dir("starcoder2"))
    plain = eager(reward_model_dir("starcoder2"))
    ids = torch.from_numpy(np.stack([item.ids[:41] for item in items()]).astype(np.int64))
    with torch.no_grad():
        torch.testing.assert_close(model.module(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    model.save(tmp_path / "again", model.contract)
    config = (tmp_path / "again" / "config.json").read_text()
    assert "attn_implementation" not in config and "plaudit" not in config.replace(str(json.loads(config)), "")


def test_models_on_several_threads_do_not_meet(reward_model_dir: ModelDir) -> None:
    models = [RewardModel.load(reward_model_dir(family)) for family in ("starcoder2", "electra")]
    expected = [model.score_encoded(items()) for model in models]
    results: list[list[bool]] = [[], []]

    def work(place: int) -> None:
        for _ in range(6):
            scores = models[place].score_encoded(items(), token_budget=200)
            results[place].append(np.array_equal(scores, expected[place]))

    threads = [threading.Thread(target=work, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True] * 6] * 2


@pytest.mark.parametrize(
    ("mask", "size", "causal", "window"),
    [
        (masking_utils.causal_mask_function, None, True, None),
        (masking_utils.sliding_window_causal_mask_function(4096), 4096, True, 4096),
        (masking_utils.sliding_window_causal_mask_function(1), 1, True, 1),
        (masking_utils.causal_mask_function, 4096, True, None),
        (masking_utils.bidirectional_mask_function, None, False, None),
        (masking_utils.sliding_window_bidirectional_mask_function(64), 64, False, 128),
    ],
)
def test_the_window_is_that_of_the_mask(mask: Any, size: int | None, causal: bool, window: int | None) -> None:
    assert window_of(mask, size, causal=causal) == window


@pytest.mark.parametrize(
    ("mask", "size", "causal"),
    [
        (masking_utils.chunked_causal_mask_function(64, torch.zeros(1, dtype=torch.int64)), 64, True),
        (masking_utils.sliding_window_causal_mask_function(1000), None, True),
        (masking_utils.sliding_window_causal_mask_function(63), 64, True),
        (masking_utils.bidirectional_mask_function, None, True),
        (masking_utils.causal_mask_function, None, False),
        (masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 10), None, True),
    ],
)
def test_any_other_mask_is_refused(mask: Any, size: int | None, causal: bool) -> None:
    with pytest.raises(Unpackable, match="mask"):
        window_of(mask, size, causal=causal)


def long_model(write_base: ModelDir, tmp_path: Path, family: str, rope: dict[str, object]) -> Path:
    """A model of 64 positions, stretched to 300 by rotary angles that depend on the length."""
    base = write_base(family)
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 64}
    config["rope_parameters"] = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, **rope}
    (tmp_path / "base").mkdir()
    for path in base.iterdir():
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    model = RewardModel.from_base(tmp_path / "base", seed=3)
    model.save(tmp_path / "model", replace(model.contract, max_length=300))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("family", "rope", "mode"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 4.0}, "exact"),
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "factor": 4.0,
                  "original_max_position_embeddings": 64}, "fast"),
    ],
)  # fmt: skip
def test_angles_that_move_with_the_length_are_those_of_the_item(
    write_base: ModelDir, tmp_path: Path, family: str, rope: dict[str, object], mode: str
) -> None:
    directory = long_model(write_base, tmp_path, family, rope)
    model = RewardModel.load(directory, mode=mode)
    assert model.trunk.reason.startswith(f"padded: rope type {rope['rope_type']} depends")
    chosen = [Encoded(np.arange(5, 5 + n, dtype=np.int32), 0) for n in (30, 290, 100, 290, 50)]
    scores = model.score_encoded(chosen)[:, 0]
    alone = []
    for item in chosen:
        with torch.inference_mode():  # a fresh module: transformers' own remembers the longest it has seen
            alone.append(eager(directory)(torch.from_numpy(item.ids.astype(np.int64))[None]).logits[0, 0])
    assert agreement(scores, np.array(alone), "float32").max_difference < 1e-5
    assert np.array_equal(model.score_encoded(chosen[::-1])[::-1, 0], scores)


def test_padded_batches_are_of_like_lengths(reward_model_dir: ModelDir) -> None:
    lengths = [5, 400, 6, 7, 380, 5, 90]
    parts = split_by_length(lengths)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    padded = [len(part) * max(lengths[i] for i in part) for part in parts]
    assert max(padded) <= sum(lengths) and sum(padded) < 1.5 * sum(lengths)
    exact, fast = (RewardModel.load(reward_model_dir("gpt_oss"), mode=mode) for mode in ("exact", "fast"))
    ragged = [*items(6, 1, 12), *items(2, 2, 300), *items(6, 3, 12)]
    expected = exact.score_encoded(ragged)[:, 0]
    assert agreement(fast.score_encoded(ragged)[:, 0], expected, "float32").holds and expected.std() > 0.1
