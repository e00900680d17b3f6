"""The model against plain transformers, and its promise that a score is a function of its item."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from plaudit_model.contract import FILE_NAME
from plaudit_model.encode import Encoded
from plaudit_model.errors import CheckpointError, ContractError
from plaudit_model.oracle import PlainModel, agreement
from plaudit_model.packing import group_items, pack
from plaudit_model.records import Conversation, Message
from plaudit_model.reward_model import RewardModel

ModelDir = Callable[[str], Path]

PACKED = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text",  # decoders
    "bert", "roberta", "modernbert",
]  # fmt: skip
"""Families with layers of ours."""

PLUGGED = [
    "olmo2", "olmo3", "phi3", "gpt_neox", "stablelm", "starcoder2", "gpt2", "deepseek_v3", "mixtral", "qwen2_moe",
    "electra", "distilbert",
]  # fmt: skip
"""Some of those that run packed through transformers' own module."""

PADDED = ["gpt_oss", "jamba", "deberta-v2"]


def conversations() -> list[Conversation]:
    opening = "What is the best way to learn a language? I have an hour a day and no teacher."
    short = (Message("user", "Hi."),)
    long = (Message("user", opening), Message("assistant", "Practise daily."), Message("user", "And then?"))
    answers = [
        "Read, and speak.",
        "",
        "No idea at all, sorry. " * 9,
        "Speak\n\nwith people.",
        "Nul \x00 is text: é 漢字",
    ]
    return [(prompt, answer) for prompt in (short, long) for answer in answers]


@pytest.mark.parametrize("family", [*PACKED, *PLUGGED, *PADDED])
def test_scores_are_those_of_plain_transformers_one_by_one(reward_model_dir: ModelDir, family: str) -> None:
    directory = reward_model_dir(family)
    model, plain = RewardModel.load(directory), PlainModel(directory)
    assert model.trunk.reason.startswith("padded" if family in PADDED else "packed")
    encoded = [model.encoder.encode(prompt, response) for prompt, response in conversations()]
    for (prompt, response), item in zip(conversations(), encoded, strict=True):
        assert item.ids.tolist() == plain.encode(prompt, response)["input_ids"]
    result = agreement(model.score_encoded(encoded)[:, 0], plain.score(conversations())[:, 0], "float32")
    assert result.std > 0.05, "the items must differ for the comparison to mean something"
    assert result.holds, result


def random_items(model: RewardModel, seed: int) -> list[Encoded]:
    generator = np.random.default_rng(seed)
    items = []
    for _ in range(4):
        prompt = generator.integers(1, 600, int(generator.integers(0, 150)), dtype=np.int32)
        for _ in range(int(generator.integers(1, 6))):
            own = generator.integers(1, 600, int(generator.integers(1, 90)), dtype=np.int32)
            items.append(Encoded(np.concatenate([prompt, own]), len(prompt)))
    return items


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, "float32") for family in [*PACKED, *PLUGGED]]
    + [(family, "bfloat16") for family in [*PACKED, "olmo2", "mixtral", "electra"]],
)
def test_exact_scores_are_the_same_bits_in_any_company(reward_model_dir: ModelDir, family: str, dtype: str) -> None:
    model = RewardModel.load(reward_model_dir(family), dtype=dtype, mode="exact")
    items = random_items(model, 1)
    alone = np.concatenate([model.score_encoded([item]) for item in items])
    generator = np.random.default_rng(2)
    for _ in range(6):
        chosen = generator.permutation(len(items))[: int(generator.integers(1, len(items) + 1))]
        scores = model.score_encoded([items[i] for i in chosen], token_budget=int(generator.integers(64, 4096)))
        assert np.array_equal(scores, alone[chosen])
    assert np.array_equal(RewardModel.load(reward_model_dir(family), dtype=dtype).score_encoded(items), alone)


def test_fast_scores_stay_within_the_published_tolerance(reward_model_dir: ModelDir) -> None:
    exact, fast = (RewardModel.load(reward_model_dir("qwen3"), mode=mode) for mode in ("exact", "fast"))
    items = random_items(exact, 3)
    assert agreement(fast.score_encoded(items)[:, 0], exact.score_encoded(items)[:, 0], "float32").holds


def test_a_prompt_is_computed_once(reward_model_dir: ModelDir) -> None:
    model = RewardModel.load(reward_model_dir("qwen3"))
    prompt = np.arange(100, dtype=np.int32)
    items = [Encoded(np.append(prompt, np.int32(200 + i)), 100) for i in range(16)]
    assert pack(group_items(items, share=model.shares_prompt)).tokens == 100 + 16


@pytest.mark.parametrize("family", [*PACKED, "starcoder2", "mixtral", "electra"])
def test_gradients_equal_those_of_plain_transformers(reward_model_dir: ModelDir, family: str) -> None:
    model = RewardModel.load(reward_model_dir(family))
    model.train_mode()
    module = PlainModel(reward_model_dir(family)).module
    items = random_items(model, 4)[:5]
    if not model.shares_prompt:  # a boundary gives an encoder's response another token type, which is not called for
        items = [Encoded(item.ids, 0) for item in items]
    batch = pack(group_items(items, share=model.shares_prompt))
    weights = torch.linspace(-1, 1, len(items))
    (model.forward(batch)[:, 0] * weights[torch.from_numpy(batch.indices)]).sum().backward()
    for weight, item in zip(weights, items, strict=True):
        (module(torch.from_numpy(item.ids.astype(np.int64))[None]).logits[0, 0] * weight).backward()
    truth = dict(module.named_parameters())
    for name, parameter in model.module.named_parameters():
        expected = truth[name].grad
        if parameter.grad is None or expected is None:  # of what is not used, such as the embedding of a second type
            assert all(grad is None or not grad.any() for grad in (parameter.grad, expected)), name
            continue
        assert (parameter.grad - expected).abs().max() <= 2e-5 * max(float(expected.abs().max()), 1.0), name


def copy(directory: Path, target: Path) -> Path:
    target.mkdir()
    for path in directory.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("family", ["qwen3", "bert", "modernbert"])
def test_frozen_weights_are_held_once_and_come_back(reward_model_dir: ModelDir, family: str, tmp_path: Path) -> None:
    directory = reward_model_dir(family)
    truth = PlainModel(directory).module.state_dict()
    model = RewardModel.load(directory, device="cpu")
    scores = model.score_encoded(random_items(model, 5))
    held = sum(tensor.untyped_storage().nbytes() for tensor in unique(model.module) if tensor.isnan().any())
    gone = [name for name, weight in model.module.named_parameters() if weight.isnan().any()]
    assert len(gone) >= 4 and held == 4 * len(gone), "one number each"
    assert model.parameters == sum(weight.numel() for weight in truth.values())
    model.save(tmp_path / "again", model.contract)
    model.freeze()
    assert np.array_equal(model.score_encoded(random_items(model, 5)), scores)
    assert np.array_equal(RewardModel.load(tmp_path / "again").score_encoded(random_items(model, 5)), scores)
    model.train_mode()
    assert all(torch.equal(weight, truth[name]) for name, weight in model.module.named_parameters())


def unique(module: torch.nn.Module) -> list[torch.Tensor]:
    """A tensor of each storage."""
    return list({weight.untyped_storage().data_ptr(): weight.detach() for weight in module.parameters()}.values())


def test_a_flipped_bit_is_refused(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    directory = copy(reward_model_dir("qwen3"), tmp_path / "m")
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-100] ^= 1
    (directory / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        RewardModel.load(directory)


def test_a_fresh_head_is_refused(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = copy(reward_model_dir("qwen3"), tmp_path / "m")
    (directory / FILE_NAME).unlink()
    weights = load_file(directory / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ContractError, match="random"):
        RewardModel.load(directory)


def test_pickle_weights_are_refused(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    directory = copy(reward_model_dir("qwen3"), tmp_path / "m")
    (directory / FILE_NAME).unlink()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        RewardModel.load(directory)


@pytest.mark.parametrize("kept", [0, -100, None])
def test_a_weight_file_that_is_cut_off_or_a_pointer_is_named(
    reward_model_dir: ModelDir, tmp_path: Path, kept: int | None
) -> None:
    directory = copy(reward_model_dir("qwen3"), tmp_path / "m")
    (directory / FILE_NAME).unlink()
    weights = directory / "model.safetensors"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n"
    weights.write_bytes(pointer if kept is None else weights.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="could not be loaded"):
        RewardModel.load(directory)
    with pytest.raises(CheckpointError, match="could not be loaded"):
        RewardModel.from_base(directory, seed=0)


def test_a_contract_that_contradicts_the_weights_is_refused(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    directory = copy(reward_model_dir("qwen3"), tmp_path / "m")
    data = json.loads((directory / FILE_NAME).read_text())
    data["head"]["attributes"] = ["helpful", "harmless"]
    (directory / FILE_NAME).write_text(json.dumps(data))
    with pytest.raises(ContractError, match="1 outputs"):
        RewardModel.load(directory)


def test_the_self_test_sees_a_wrong_attention(reward_model_dir: ModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from plaudit_model import decoder

    right = decoder.packed_attention
    wrong = lambda *args, scale, **rest: right(*args, scale=scale * 1.1, **rest)  # noqa: E731
    monkeypatch.setattr(decoder, "packed_attention", wrong)
    with pytest.raises(ContractError, match="plain model"):
        RewardModel.load(reward_model_dir("qwen3"))


def test_a_head_that_is_not_ours_stays_with_its_architecture(foreign_dir: ModelDir) -> None:
    directory = foreign_dir("modernbert")
    plain, model = PlainModel(directory), RewardModel.load(directory)
    assert "padded" in model.path_reason and not model.shares_prompt
    encoded = [model.encoder.encode(prompt, response) for prompt, response in conversations()]
    scores = model.score_encoded(encoded)[:, 0]
    assert agreement(scores, plain.score(conversations())[:, 0], "float32").holds
    alone = np.concatenate([model.score_encoded([item]) for item in encoded])
    assert np.array_equal(scores, alone[:, 0])
    with pytest.raises(ContractError, match="float32"):
        RewardModel.load(directory, dtype="bfloat16")
    with pytest.raises(ContractError, match="cannot be trained yet"):
        RewardModel.from_base(directory, seed=0)


@pytest.mark.parametrize("options", [{"mode": "Exact"}, {"dtype": "fp16"}])
def test_a_misspelt_dtype_or_mode_is_refused(reward_model_dir: ModelDir, options: dict[str, str]) -> None:
    with pytest.raises(ContractError, match="must be one of"):
        RewardModel.load(reward_model_dir("qwen3"), **options)


def test_not_a_number_never_leaves_the_model(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    model = RewardModel.load(reward_model_dir("qwen3"))
    with torch.no_grad():
        model.module.score.weight[0, 0] = float("nan")
    model.save(tmp_path / "nan", model.contract)
    with pytest.raises(ContractError, match="not finite"):
        RewardModel.load(tmp_path / "nan")


def test_bf16_keeps_the_head_in_fp32(reward_model_dir: ModelDir) -> None:
    exact, half = (RewardModel.load(reward_model_dir("bert"), dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert half.module.bert.encoder.layer[0].attention.self.query.weight.dtype == torch.bfloat16
    for name in ("bert.pooler.dense.weight", "classifier.weight"):
        assert torch.equal(half.module.state_dict()[name], exact.module.state_dict()[name])


def test_saving_and_loading_changes_no_score(reward_model_dir: ModelDir, tmp_path: Path) -> None:
    model = RewardModel.load(reward_model_dir("qwen3"))
    items = random_items(model, 5)
    model.save(tmp_path / "again", model.contract)
    again = RewardModel.load(tmp_path / "again")
    assert np.array_equal(again.score_encoded(items), model.score_encoded(items))
    assert again.contract.revision() == model.contract.revision()
