"""LoRA adapters against PEFT's own forward: gradients, directories of ours and of others, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from plaudit_model import infer
from plaudit_model.contract import ADAPTER_FILE, write
from plaudit_model.encode import Encoded
from plaudit_model.errors import AdapterError, CheckpointError, ModelError
from plaudit_model.merge import merge_adapter
from plaudit_model.oracle import PlainModel, agreement
from plaudit_model.packing import group_items, pack
from plaudit_model.records import Conversation, Message
from plaudit_model.reward_model import RewardModel

# PEFT's model asks transformers by a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:Setting `save_embedding_layers`:UserWarning"
)

ModelDir = Callable[[str], Path]
Foreign = Callable[..., Path]

SETTINGS: dict[str, Any] = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ("all-linear",), "use_rslora": False}
HEADS = {"qwen3": ["score"], "bert": ["bert.pooler.dense", "classifier"], "roberta": ["classifier"],
         "modernbert": ["classifier", "head"]}  # fmt: skip
WEIGHTS = "adapter_model.safetensors"


def adapted(directory: Path, **settings: Any) -> RewardModel:
    """A reward model with adapters that do something: B is 0 at first."""
    model = RewardModel.from_base(directory, seed=1, device="cpu")
    model.adapt(str(directory), seed=1, **SETTINGS | settings)
    stir(model.module)
    return model


def stir(module: torch.nn.Module) -> None:
    """Adapters and head away from where they start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_" in name or parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def ragged_items(*, sharing: bool) -> list[Encoded]:
    generator = np.random.default_rng(3)
    prompt = generator.integers(5, 600, 41, dtype=np.int32)
    items = []
    for tokens in (1, 17, 60, 33, 90):
        own = generator.integers(5, 600, tokens, dtype=np.int32)
        items.append(Encoded(np.concatenate([prompt, own]), len(prompt) if sharing else 0))
    return items


def conversations() -> list[Conversation]:
    prompt = (Message("user", "What is the best way to learn a language? I have an hour a day and no teacher."),)
    return [(prompt, text) for text in ("Read, and speak.", "No idea at all, sorry. " * 9, "Speak\n\nwith people.", "")]


def scores_of(model: RewardModel) -> NDArray[np.float32]:
    return model.score_encoded([model.encoder.encode(prompt, response) for prompt, response in conversations()])[:, 0]


def plain(name: str) -> str:
    """A parameter's name in PEFT's model as it is in ours."""
    return name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")


def in_peft(directory: Path, model: RewardModel, heads: list[str], settings: dict[str, Any]) -> Any:
    """PEFT's own model of the same `settings`, with the adapters and the head of ours."""
    import peft
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, attn_implementation="eager")
    targets = settings["target_modules"]
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=settings["r"], lora_alpha=settings["alpha"], use_rslora=settings["use_rslora"],
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        exclude_modules="|".join(f"{head}.*" for head in heads), modules_to_save=list(heads),
    )  # fmt: skip
    reference = peft.get_peft_model(base, config)
    ours = dict(model.module.named_parameters())
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ours[plain(name)])
    return reference


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3", {}),
        ("qwen3", {"target_modules": ("q_proj", "v_proj", "up_proj")}),  # beside layers without an adapter
        ("bert", {}),
        ("roberta", {}),
        ("modernbert", {"use_rslora": True, "r": 9}),
    ],
)
def test_gradients_are_those_of_peft_over_padded_rows(
    reward_model_dir: ModelDir, family: str, settings: dict[str, Any]
) -> None:
    directory = reward_model_dir(family)
    model = adapted(directory, **settings)
    reference = in_peft(directory, model, HEADS[family], SETTINGS | settings)
    items = ragged_items(sharing=model.shares_prompt)
    weights = torch.linspace(-1, 1.5, len(items))

    model.train_mode()
    batch = pack(group_items(items, share=model.shares_prompt))
    scores = model.forward(batch)[:, 0]
    (scores * weights[torch.from_numpy(batch.indices)]).sum().backward()

    lengths = torch.tensor([len(item.ids) for item in items])
    rows = [torch.from_numpy(item.ids.astype(np.int64)) for item in items]
    padding = int(model.module.config.pad_token_id)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
    expected = reference.eval()(input_ids=padded, attention_mask=mask).logits[:, 0]
    (expected * weights).sum().backward()

    torch.testing.assert_close(scores[torch.from_numpy(np.argsort(batch.indices))], expected, rtol=2e-5, atol=2e-5)
    truth = {plain(name): p.grad for name, p in reference.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
    assert model.adapter is not None and ours.keys() == truth.keys() == model.adapter.trained, "the base is frozen"
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, f"{name} has a gradient to compare"
        assert (gradient - truth[name]).abs().max() <= 2e-5 * max(float(truth[name].abs().max()), 1.0), name


def test_fresh_adapters_change_no_score_and_are_a_function_of_the_seed(reward_model_dir: ModelDir) -> None:
    base = RewardModel.from_base(reward_model_dir("qwen3"), seed=0)
    models = [RewardModel.from_base(reward_model_dir("qwen3"), seed=0) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.adapt("a base", seed=seed, **SETTINGS)
        np.testing.assert_allclose(scores_of(model), scores_of(base), rtol=1e-5, atol=1e-5)
    one, again, other = ({n: p.detach() for n, p in m.module.named_parameters() if ".lora_A." in n} for m in models)
    assert all(torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("layers.0.mlp.down_proj",)])
def test_only_what_is_named_is_adapted(reward_model_dir: ModelDir, targets: tuple[str, ...]) -> None:
    model = adapted(reward_model_dir("qwen3"), target_modules=targets)
    assert model.adapter is not None
    layers = {name.split(".lora_")[0] for name in model.adapter.trained if ".lora_" in name}
    assert len(layers) == (4 if len(targets) == 2 else 1) and all(layer.endswith(targets) for layer in layers)


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_a_merged_model_scores_as_the_live_one_and_trains_no_more(reward_model_dir: ModelDir, family: str) -> None:
    model = adapted(reward_model_dir(family))  # packed, and through the architecture's own forward
    with pytest.raises(AdapterError, match="freeze"):
        model.save(Path("nowhere"), model.contract)
    live = scores_of(model)
    trained = model.trained_parameters
    assert 0 < trained < 0.2 * model.parameters
    model.freeze()
    np.testing.assert_allclose(scores_of(model), live, rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterError, match="merged"):
        model.train_mode()


def test_what_is_rounded_to_8_bits_is_the_merged_weight(reward_model_dir: ModelDir, ours: ModelDir) -> None:
    whole, narrow = (RewardModel.load(ours("qwen3"), dtype=dtype, device="cpu") for dtype in ("float32", "int8"))
    base = RewardModel.load(reward_model_dir("qwen3"), dtype="int8", device="cpu")
    scores, rounded, without = (scores_of(model) for model in (whole, narrow, base))
    assert 0 < np.abs(rounded - scores).max() < 0.2 * np.abs(without - scores).max()


def test_dropout_is_there_in_training_alone(reward_model_dir: ModelDir) -> None:
    model = adapted(reward_model_dir("qwen3"), dropout=0.5)
    live = scores_of(model)
    model.train_mode()
    assert not np.allclose(scores_of(model), live, atol=1e-3)
    model.eval_mode()
    assert np.array_equal(scores_of(model), live)


# -- directories ---------------------------------------------------------------------------------------------


def write_ours(model: RewardModel, directory: Path, base: Path) -> None:
    """As training does."""
    from dataclasses import replace

    from plaudit_model.store import weights_identity

    model.freeze()
    contract = replace(model.contract, lineage={"base": {"name": str(base), **weights_identity(base)}})
    model.save(directory, contract, as_adapter=True)


@pytest.fixture(scope="module")
def ours(reward_model_dir: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`ours("bert")` is an adapter directory that was written here, on a base of that family."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("ours") / family
            write_ours(adapted(reward_model_dir(family)), made[family], reward_model_dir(family))
        return made[family]

    return make


@pytest.mark.parametrize("family", ["qwen3", "bert"])
def test_our_directory_is_one_that_peft_reads(ours: ModelDir, reward_model_dir: ModelDir, family: str) -> None:
    import peft
    from transformers import AutoModelForSequenceClassification

    names = {path.name for path in ours(family).iterdir()}
    assert {ADAPTER_FILE, WEIGHTS, "reward.json", "tokenizer.json"} <= names
    assert not names & {"config.json", "model.safetensors"}
    model = RewardModel.load(ours(family))
    assert "packed" in model.path_reason
    base = AutoModelForSequenceClassification.from_pretrained(reward_model_dir(family), num_labels=1)
    reference = peft.PeftModel.from_pretrained(base, str(ours(family))).eval()
    item = ragged_items(sharing=False)[3]
    with torch.no_grad():
        expected = reference(input_ids=torch.from_numpy(item.ids.astype(np.int64))[None]).logits[0, 0].item()
    assert model.score_encoded([item])[0, 0] == pytest.approx(expected, abs=2e-5)
    assert agreement(scores_of(model), PlainModel(ours(family)).score(conversations())[:, 0], "float32").holds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_to_a_checkpoint_changes_no_bit(ours: ModelDir, tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForSequenceClassification

    merge_adapter(ours("qwen3"), tmp_path / "merged")
    expected = scores_of(RewardModel.load(ours("qwen3"), dtype=dtype))
    assert np.array_equal(scores_of(RewardModel.load(tmp_path / "merged", dtype=dtype)), expected)
    assert not (tmp_path / "merged" / ADAPTER_FILE).exists()
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with pytest.raises(FileExistsError):
        merge_adapter(ours("qwen3"), tmp_path / "merged")


@pytest.fixture(scope="module")
def foreign(write_base: ModelDir, tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    """`foreign("qwen3", r=2)` is an adapter as PEFT writes it, with nothing of ours, on a base without a score head."""
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification

    bases: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in bases:
            bases[family] = tmp_path_factory.mktemp("bases") / family
            shutil.copytree(write_base(family), bases[family])
            kind = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
            module = kind.from_config(AutoConfig.from_pretrained(bases[family]))
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.dim() == 2:
                        noise = torch.randn(parameter.shape, generator=generator)
                        parameter.copy_(noise * parameter.shape[1] ** -0.5)
            module.save_pretrained(bases[family])
        return bases[family]

    def make(family: str, **settings: Any) -> Path:
        directory = tmp_path_factory.mktemp("foreign-adapters") / family
        torch.manual_seed(4)
        module = AutoModelForSequenceClassification.from_pretrained(base(family), num_labels=settings.pop("labels", 1))
        whole = peft.get_peft_model(module, peft.LoraConfig(**{"task_type": "SEQ_CLS", **settings}))
        stir(whole)
        whole.save_pretrained(str(directory))
        return directory

    return make


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]}),
    ("qwen3", {"r": 3, "target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
    ("qwen3", {"r": 2, "target_modules": ["embed_tokens", "o_proj"], "rank_pattern": {"o_proj": 5}}),
    ("bert", {"r": 2, "target_modules": ["query", "value"], "modules_to_save": ["pooler"], "bias": "lora_only"}),
]


@pytest.mark.parametrize(("family", "settings"), KINDS)
def test_an_adapter_of_pefts_own_is_served(foreign: Foreign, family: str, settings: dict[str, Any]) -> None:
    directory = foreign(family, **settings)
    model = RewardModel.load(directory)
    assert model.contract.max_length == 512 and "packed" in model.path_reason
    reference = PlainModel(directory).score(conversations())[:, 0]
    result = agreement(scores_of(model), reference, "float32")
    assert result.std > 0.05 and result.holds, result
    assert agreement(scores_of(RewardModel.load(directory, dtype="bfloat16")), reference, "bfloat16").holds


def test_another_base_is_another_revision_and_refused_once_it_is_written_down(foreign: Foreign, tmp_path: Path) -> None:
    directory = copy(foreign("qwen3", **KINDS[0][1]), tmp_path / "adapter")
    base = copy(infer.base_of(directory), tmp_path / "base")
    edit(directory / ADAPTER_FILE, base_model_name_or_path=str(base))
    before = infer.contract_for(directory)
    write(before, directory)
    RewardModel.load(directory)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="not the base"):
        RewardModel.load(directory)
    (directory / "reward.json").unlink()
    assert infer.contract_for(directory).revision() != before.revision()


def test_a_base_that_was_moved_is_found_beside_the_adapter(
    reward_model_dir: ModelDir, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    first = copy(reward_model_dir("qwen3"), tmp_path / "here/base")
    write_ours(adapted(first), tmp_path / "here/adapter", first)
    expected = scores_of(RewardModel.load(tmp_path / "here/adapter"))
    (tmp_path / "here").rename(tmp_path / "there")
    assert np.array_equal(scores_of(RewardModel.load(tmp_path / "there/adapter")), expected)
    assert "is taken to be" in caplog.text
    shutil.rmtree(tmp_path / "there/base")
    with pytest.raises(AdapterError, match="not to be had"):
        RewardModel.load(tmp_path / "there/adapter")


def copy(directory: Path, target: Path) -> Path:
    return Path(shutil.copytree(directory, target))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop(directory: Path, part: str) -> None:
    """Take the tensors whose names hold `part` out of an adapter."""
    kept = {name: tensor for name, tensor in load_file(directory / WEIGHTS).items() if part not in name}
    save_file(kept, directory / WEIGHTS, metadata={"format": "pt"})


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit(directory / ADAPTER_FILE, **changes)


def pickled(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda d: drop(d, "score"), AdapterError, "weights for score: it would be random"),
        (lambda d: drop(d, "layers.1.self_attn.v_proj.lora_B"), AdapterError, "v_proj.lora_B is only on one"),
        (config(target_modules=["q_proj"]), AdapterError, "is only on one side"),
        (config(r=3), AdapterError, "does not fit its base"),
        (config(task_type="CAUSAL_LM"), AdapterError, "LORA adapter for CAUSAL_LM"),
        (config(peft_type="IA3"), AdapterError, "IA3 adapter"),
        (config(base_model_name_or_path="/no/such/place"), AdapterError, "not to be had"),
        (config(base_model_name_or_path=None), AdapterError, "does not name its base"),
        (pickled, CheckpointError, "No such file"),
        (lambda d: (d / WEIGHTS).write_bytes(b"\x07" * 40), CheckpointError, "only that is read, is no good"),
    ],
)
def test_what_does_not_fit_is_refused(
    foreign: Foreign, tmp_path: Path, damage: Callable[[Path], None], error: type[ModelError], said: str
) -> None:
    directory = copy(foreign("qwen3", **KINDS[0][1]), tmp_path / "adapter")
    damage(directory)
    with pytest.raises(error, match=said):
        RewardModel.load(directory)


def test_a_head_of_two_outputs_is_refused(foreign: Foreign) -> None:
    with pytest.raises(AdapterError, match="size mismatch"):
        RewardModel.load(foreign("qwen3", labels=2, r=2, target_modules=["q_proj"]))


def test_a_pooler_that_nobody_kept_is_refused(foreign: Foreign) -> None:
    """PEFT adapts BERT's pooler, or leaves it, and a base for masked language has none."""
    with pytest.raises(AdapterError, match="weights for bert.pooler.dense"):
        RewardModel.load(foreign("bert", r=2, target_modules="all-linear"))


def test_a_flipped_bit_of_our_adapter_is_refused(ours: ModelDir, tmp_path: Path) -> None:
    directory = copy(ours("qwen3"), tmp_path / "adapter")
    data = bytearray((directory / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (directory / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        RewardModel.load(directory)


def test_the_proof_at_load_sees_a_wrong_merge(ours: ModelDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import Linear

    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 1.1 * right(self, name))
    with pytest.raises(ModelError, match="plain model"):
        RewardModel.load(ours("qwen3"))


def test_what_cannot_be_adapted_says_why(write_base: ModelDir, reward_model_dir: ModelDir, ours: ModelDir) -> None:
    with pytest.raises(AdapterError, match="has no weights"):
        adapted(write_base("qwen3"))
    with pytest.raises(AdapterError, match="called qproj; there are down_proj, gate_proj"):
        adapted(reward_model_dir("qwen3"), target_modules=("v_proj", "qproj"))
    with pytest.raises(AdapterError, match="merge it into its base first"):
        RewardModel.from_base(ours("qwen3"), seed=0)


def test_an_adapter_of_an_adapter_is_refused(ours: ModelDir, tmp_path: Path) -> None:
    directory = copy(ours("qwen3"), tmp_path / "adapter")
    edit(directory / ADAPTER_FILE, base_model_name_or_path=str(ours("qwen3")))
    (directory / "reward.json").unlink()
    with pytest.raises(AdapterError, match="itself an adapter"):
        RewardModel.load(directory)
