"""Modules of transformers as directories hold them, and the model that training starts from: any checkpoint of a
supported architecture, with a head of one output."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from . import contract as contracts
from . import infer
from .contract import FILE_NAME, RewardContract, Template
from .encode import Encoder, special_tokens
from .errors import AdapterError, CheckpointError, ContractError
from .heads import final_layer, hidden_layers, init_head, is_known
from .store import check_weights
from .template import CHATML

logger = logging.getLogger("plaudit.model")

_RESERVED_PADS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<|pad|>", "<pad>", "<unk>")


def load_base(directory: Path, *, seed: int, max_length: int | None) -> tuple[nn.Module, RewardContract]:
    """The module, in fp32 with dropout off, and the contract that training will complete.

    Raises CheckpointError for pickle weights, ContractError where the length cannot be known or for an export.
    """
    if infer.is_adapter(directory):
        raise AdapterError(f"{directory} is an adapter: merge it into its base first (plaudit_model.merge)")
    if (directory / FILE_NAME).is_file() and contracts.read(directory).serving.backend == "onnx":
        raise ContractError(f"{directory} is an ONNX export, made to be served; train from the model it was made of")
    config = _config(directory)
    module = _module(directory, config, seed)
    return module, _contract(directory, type(module).__name__, max_length)


def _config(directory: Path) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, num_labels=1)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory} has no configuration that transformers reads: {error}") from error
    for name, value in config.to_dict().items():
        if isinstance(value, float) and any(part in name for part in ("drop", "jitter")):
            setattr(config, name, 0.0)
    if config.pad_token_id is None or config.pad_token_id in token_ids(config.eos_token_id):
        config.pad_token_id = _pad_token(directory, config)
    return config


def quiet() -> None:
    """Keep transformers' progress bars and warnings out of logs: what is to be known of a model is said here."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def load_weights(directory: Path, **options: Any) -> tuple[nn.Module, set[str]]:
    """The sequence classifier in a directory, with `options` for `from_pretrained`, and the names of the weights that
    it has none for, or none of that shape: those are random. Raises CheckpointError."""
    check_weights(directory)
    quiet()
    try:
        module, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            directory, use_safetensors=True, local_files_only=True, ignore_mismatched_sizes=True,
            output_loading_info=True, **options,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{directory} could not be loaded: {error}") from error
    return module, set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}


def load_module(directory: Path) -> nn.Module:
    """That classifier as it is stored. Raises ContractError if its head would be random."""
    module, fresh = load_weights(directory, dtype="auto")
    if fresh:
        raise ContractError(
            f"{directory} has no weights for {min(fresh)}: its head would be random. Train it with `plaudit train`"
        )
    return module


def skeleton_of(directory: Path, contract: RewardContract) -> nn.Module:
    """The architecture without its weights."""
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    with torch.device("meta"):
        module: nn.Module = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    check_module(module, contract, directory)
    return module


def check_module(module: nn.Module, contract: RewardContract, directory: Path) -> None:
    """Raises ContractError unless the module is what the contract is of."""
    if type(module).__name__ != contract.architecture:
        raise ContractError(f"{directory} holds {type(module).__name__}, the contract says {contract.architecture}")
    outputs = int(module.config.num_labels)  # type: ignore[union-attr, arg-type]
    if outputs != len(contract.head.attributes):
        raise ContractError(f"the head has {outputs} outputs, the contract names {len(contract.head.attributes)}")


def check_vocabulary(module: Any, encoder: Encoder, directory: Path) -> None:
    """Raise CheckpointError if the tokenizer gives ids that have no embedding: some text would fail, later."""
    rows = module.get_input_embeddings().weight.shape[0]
    if encoder.vocabulary > rows:
        raise CheckpointError(
            f"the tokenizer of {directory} has {encoder.vocabulary:,} tokens, the embeddings have {rows:,}: take the "
            f"tokenizer they were trained with, or resize_token_embeddings({encoder.vocabulary}) and save the model"
        )


def _module(directory: Path, config: Any, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not any(directory.glob("*.safetensors")) and not any(directory.glob("*.bin")):
            logger.info("%s has no weights: starting from scratch", directory)
            module: nn.Module = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
            init_head(_known_head(module), seed)
            return module
        module, missing = load_weights(directory, config=config, dtype=torch.float32)
    _init_missing(module, missing, seed)
    return module


def _init_missing(module: nn.Module, missing: set[str], seed: int) -> None:
    """Seeded weights for the head where the checkpoint has none; anything else missing is an error."""
    _known_head(module)
    names = {id(layer): name for name, layer in module.named_modules()}
    for layer in (*_linears(module), final_layer(module)):
        if f"{names[id(layer)]}.weight" in missing:
            init_head(layer, seed)
            missing -= {f"{names[id(layer)]}.{part}" for part in ("weight", "bias")}
    if missing:
        raise CheckpointError(f"the base has no weights for {sorted(missing)[0]}; is it a complete checkpoint?")


def _linears(module: nn.Module) -> list[nn.Linear]:
    """The linear layers of the head before its final one."""
    return [part for layer in hidden_layers(module) for part in layer.modules() if isinstance(part, nn.Linear)]


def _known_head(module: nn.Module) -> nn.Linear:
    if not is_known(module):
        raise ContractError(f"{type(module).__name__} cannot be trained yet: its head is not one that is computed here")
    return final_layer(module)


def _contract(directory: Path, architecture: str, max_length: int | None) -> RewardContract:
    limit = infer.max_length(directory)
    if (directory / FILE_NAME).is_file():
        known = contracts.read(directory)
        return replace(
            known,
            max_length=min(max_length or known.max_length, limit),
            architecture=architecture,
            lineage={},
            evaluation={},
            label="",
        )
    template = infer.infer_template(directory)
    if template is None:
        logger.warning("%s has no chat template: conversations are rendered as ChatML text", directory)
        template = Template.of("chat", CHATML)
    return RewardContract(
        architecture=architecture,
        template=template,
        max_length=min(max_length or limit, limit),
        pooling="first" if template.kind == "pair" else "last",
    )


def _pad_token(directory: Path, config: Any) -> int | None:
    """A padding id other than the end of text. Our own forward needs none; plain transformers, which pools at
    the rightmost token that is not padding, does."""
    path = directory / infer.TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {infer.TOKENIZER_FILE}; only fast tokenizers are read")
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    ends = token_ids(config.eos_token_id)
    for token in (special_tokens(directory).get("pad_token", ""), *_RESERVED_PADS):
        found = tokenizer.token_to_id(token)
        if found is not None and found not in ends:
            return int(found)
    return next(iter(ends), None)


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A configuration's token id, which may be absent or a list of them."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
