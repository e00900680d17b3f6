"""A reward model in memory: load, score, save. The same object trains and serves."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from plaudit_kernels import BLOCK, select

from . import contract as contracts
from . import store
from .base import load_base, token_ids
from .build import kernel_build
from .contract import FILE_NAME, RewardContract, Serving
from .encode import Encoded, Encoder
from .errors import CheckpointError, ContractError
from .heads import head_modules, is_known
from .infer import contract_for, resolve
from .laps import Laps
from .packing import PackedBatch, group_items, pack, split_by_budget
from .proof import plain_scores, prove
from .trunk import make_trunk

logger = logging.getLogger("plaudit.model")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


class RewardModel:
    """A sequence classifier of transformers with its contract, its encoder and a packed forward."""

    def __init__(
        self, module: nn.Module, contract: RewardContract, directory: Path, *, device: str, dtype: str, mode: str
    ) -> None:
        self.contract = contract
        self.directory = directory
        self.encoder = Encoder.open(directory, contract)
        self.device, self.dtype, self.mode = device, dtype, mode
        self.module = _cast(module, DTYPES[dtype]).to(device)
        self.module.requires_grad_(True).eval()
        self.trunk = make_trunk(self.module, pooling=contract.pooling, exact=mode == "exact")
        self.choice = select(torch.device(device))
        self.laps = Laps()
        self._frozen = False

    @classmethod
    def load(
        cls, name: str | Path, *, device: str = "auto", dtype: str | None = None, mode: str | None = None
    ) -> RewardModel:
        """The reward model in a directory, on the Hub, or the fitted `starter`; None means as its contract says.

        Raises CheckpointError for missing or changed files and pickle weights, ContractError for a fresh head,
        a contract that contradicts the weights, or scores that depend on the batch.
        """
        laps = Laps()
        directory = resolve(name)
        contract = contract_for(directory)
        serving = replace(contract.serving, **_given(dtype=dtype, mode=mode))
        store.check_weights(directory)
        if (directory / FILE_NAME).is_file():  # an inferred contract was made from these very files
            store.check_files(directory, contract)
        module = _load_module(directory, contract)
        if not is_known(module) and serving.dtype != "float32":
            raise ContractError(f"{contract.architecture} runs through its own head, which needs --dtype float32")
        laps.lap("load")
        reference, stored = plain_scores(module, contract), next(module.parameters()).dtype
        laps.lap("proof")
        model = cls(module, contract, directory, device=choose_device(device), dtype=serving.dtype, mode=serving.mode)
        model.freeze()
        laps.lap("load")
        prove(model, reference, stored)
        laps.lap("proof")
        model.laps = laps
        return model

    @classmethod
    def from_base(
        cls, name: str | Path, *, seed: int, max_length: int | None = None, dtype: str = "float32", device: str = "auto"
    ) -> RewardModel:
        """A model to be trained, from any checkpoint of a supported architecture: its head is kept if it has one
        of one output, else it is fresh. A directory with a configuration and no weights starts from scratch."""
        directory = resolve(name)
        module, contract = load_base(directory, seed=seed, max_length=max_length)
        serving = Serving(dtype="bfloat16" if dtype == "bfloat16" else "float32")
        contract = replace(contract, serving=serving, statistics=None, calibration=None, files={})
        return cls(module, contract, directory, device=choose_device(device), dtype=dtype, mode="exact")

    @property
    def shares_prompt(self) -> bool:
        """Whether a common prompt is computed once."""
        return self.trunk.shares_prompt

    @property
    def path_reason(self) -> str:
        """Which path the forward takes, and why."""
        return f"{self.trunk.reason}; {self.choice.reason}"

    @property
    def sharing(self) -> str:
        """What `/info` says of prompt sharing."""
        if self.shares_prompt:
            return "prompts"
        return "n/a: a bidirectional prompt depends on its response" if "packed" in self.trunk.reason else "n/a: padded"

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def numerics(self) -> str:
        """Everything that the bits of a score depend on besides the model: an id, equal on equal replicas."""
        kind = torch.device(self.device).type
        unit = torch.backends.cpu.get_cpu_capability().lower()
        if kind != "cpu":
            unit = torch.cuda.get_device_name(self.device).replace(" ", "_")
        versions = f"torch{torch.__version__}-transformers{transformers.__version__}"
        if self.choice.implementation == "triton":
            versions += f"-triton{metadata.version('triton')}"
        kernels = f"{self.choice.implementation}.{kernel_build()}"
        return f"{versions}-{kind}.{unit}-{self.dtype}-{self.mode}-b{BLOCK}-{kernels}"

    @property
    def pad_token_id(self) -> int | None:
        """The id that plain transformers would skip when it pools."""
        return getattr(self.module.config, "pad_token_id", None)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids of the end of a turn that the configuration names."""
        return token_ids(getattr(self.module.config, "eos_token_id", None))

    def freeze(self) -> None:
        """Weights will not change any more: they are laid out for speed, and there are no gradients."""
        self.module.requires_grad_(False)
        self.trunk.freeze()
        self._frozen = True

    def train_mode(self) -> None:
        """Ready for training. Dropout stays off: the two responses of a pair must see the same network."""
        self.trunk.thaw()
        self._frozen = False
        self.module.requires_grad_(True).train()

    def eval_mode(self) -> None:
        self.module.eval()

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Attributes (N, A) fp32, with gradients where they are enabled; row i belongs to `batch.indices[i]`."""
        return self.trunk(batch)

    @torch.inference_mode()
    def score_encoded(self, items: Sequence[Encoded], *, token_budget: int = 4096) -> NDArray[np.float32]:
        """Attributes (N, A) fp32 in the caller's order, without gradients."""
        scores = np.empty((len(items), len(self.contract.head.attributes)), dtype=np.float32)
        for groups in split_by_budget(group_items(items, share=self.shares_prompt), token_budget):
            batch = pack(groups)
            scores[batch.indices] = self.forward(batch).cpu().numpy()
        return scores

    def save(self, directory: Path, contract: RewardContract) -> None:
        """Write a checkpoint directory, atomically: weights as safetensors, configuration, tokenizer, and the
        contract with the sha256 of every other file."""
        logging.getLogger("transformers").setLevel(logging.ERROR)
        with self._written_out(), store.atomic_directory(directory) as staging:
            self.module.save_pretrained(staging)  # type: ignore[operator]
            for pattern in _SIDE_FILES:
                for path in self.directory.glob(pattern):
                    if path.name not in (FILE_NAME, "config.json") and not path.name.endswith(".index.json"):
                        shutil.copyfile(path, staging / path.name)
            if contract.template.kind == "chat":
                (staging / "chat_template.jinja").write_text(contract.template.source, encoding="utf-8")
            contract = replace(contract, files=store.hash_files(staging))
            contracts.write(contract, staging)
        self.contract = contract

    @contextmanager
    def _written_out(self) -> Iterator[None]:
        """The weights where transformers looks for them: a frozen trunk may keep them elsewhere."""
        self.trunk.thaw()
        try:
            yield
        finally:
            if self._frozen:
                self.trunk.freeze()


def choose_device(device: str) -> str:
    """`auto` is the GPU if there is one."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load_module(directory: Path, contract: RewardContract) -> nn.Module:
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        module: nn.Module
        module, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            directory, output_loading_info=True, dtype="auto", use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{directory} could not be loaded: {error}") from error
    fresh = sorted(set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]})
    if fresh:
        raise ContractError(
            f"{directory} has no weights for {fresh[0]}: its head would be random. Train it with `plaudit train`"
        )
    _check_contract(module, contract, directory)
    return module


def _check_contract(module: nn.Module, contract: RewardContract, directory: Path) -> None:
    if type(module).__name__ != contract.architecture:
        raise ContractError(f"{directory} holds {type(module).__name__}, the contract says {contract.architecture}")
    outputs = int(module.config.num_labels)  # type: ignore[union-attr, arg-type]
    if outputs != len(contract.head.attributes):
        raise ContractError(f"the head has {outputs} outputs, the contract names {len(contract.head.attributes)}")


def _given(**options: str | None) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The trunk in `dtype`, the head in fp32. The head is taken aside so that it is never rounded."""
    heads = head_modules(module)
    kept = [{name: tensor.float() for name, tensor in head.state_dict().items()} for head in heads]
    module.to(dtype)
    for head, state in zip(heads, kept, strict=True):
        head.float().load_state_dict(state)
    return module
