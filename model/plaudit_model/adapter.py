"""LoRA adapters (Hu et al., 2106.09685) and the trained head beside them.

The layers and the files are PEFT's, so what is written here PEFT reads, and what PEFT wrote is read here. The base is
frozen; adapters and head are trained in fp32, and the head is kept whole (`modules_to_save`): a base has none, or one
that was trained for something else. What is served is merged, W + (alpha / r) B A, added in fp32 before the weights are
cast to the dtype that is served; on the CPU, so that a run that trained on a GPU ends with the bits that a load gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from plaudit._extras import install

from .base import load_weights
from .contract import RewardContract
from .errors import AdapterError, CheckpointError
from .heads import head_modules
from .infer import base_of

WEIGHTS_FILE = "adapter_model.safetensors"
EVERY_LINEAR = ("all-linear",)
_NAME = "default"
_PREFIX = "base_model.model."


class Adapter:
    """Adapters inside a transformers module. `trained` names the parameters that belong to them and to the head."""

    def __init__(self, module: nn.Module, tuner: Any, heads: Sequence[str]) -> None:
        self.module = module
        self.merged = False
        self._tuner, self._heads = tuner, heads
        inside = tuple(f"{head}." for head in heads)
        self.trained = frozenset(n for n, _ in module.named_parameters() if ".lora_" in n or n.startswith(inside))
        self._tensors: dict[str, torch.Tensor] = {}

    @classmethod
    def attach(
        cls, module: nn.Module, *, base: str, seed: int, r: int, alpha: int, dropout: float,
        target_modules: tuple[str, ...], use_rslora: bool,
    ) -> Adapter:  # fmt: skip
        """Fresh adapters in the linear layers of a module's trunk, which then scores as before. `target_modules` are
        ends of the layers' names; `base` is how the files will name the module. Raises AdapterError."""
        peft, heads = require_peft(), _head_names(module)
        inside = {id(part) for head in heads for part in module.get_submodule(head).modules()}
        linear = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and id(m) not in inside]
        for target in () if target_modules == EVERY_LINEAR else target_modules:
            if not any(f".{name}".endswith(f".{target}") for name in linear):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
                raise AdapterError(f"no linear layer of the trunk is called {target}; there are {known}")
        config = peft.LoraConfig(
            task_type="SEQ_CLS", base_model_name_or_path=base,
            r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=use_rslora,
            target_modules=linear if target_modules == EVERY_LINEAR else list(target_modules),
            exclude_modules=sorted(n for n, m in module.named_modules() if id(m) in inside),
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(module, peft.LoraModel(module, config, _NAME), heads)

    @classmethod
    def open(cls, directory: Path, contract: RewardContract, **options: Any) -> Adapter:
        """The adapter in a directory, on its base in fp32, not merged: the forward of `module` is PEFT's.

        `options` are those of `from_pretrained`. Raises CheckpointError for files that cannot be read, AdapterError
        where adapter and base do not fit or a head would be random.
        """
        peft, base = require_peft(), base_of(directory)
        try:
            with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
                stored = {_plain(name.removeprefix(_PREFIX)) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{WEIGHTS_FILE} of {directory}, and only that is read, is no good: {error}"
            ) from error
        outputs = len(contract.head.attributes)
        module, fresh = load_weights(base, num_labels=outputs, dtype=torch.float32, **options)
        if random := sorted(_plain(name) for name in fresh if _plain(name) not in stored):
            raise AdapterError(
                f"neither {directory} nor its base has weights for {random[0]}: it would be random. Train the adapter "
                "with its head (PEFT's modules_to_save)"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it warns of is an error below
                whole = peft.PeftModel.from_pretrained(module, str(directory), torch_device="cpu")
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise AdapterError(f"{directory} does not fit its base {base}: {error}") from error
        names = {_plain(name): name for name, _ in module.named_parameters()}
        wanted = {plain for plain, name in names.items() if ".lora_" in name or ".modules_to_save." in name}
        if odd := sorted((wanted - stored) | (stored - set(names))):
            raise AdapterError(f"{directory} does not fit its base {base}: {odd[0]} is only on one side")
        return cls(module.eval(), whole.base_model, ())

    def merge(self) -> None:
        """Make the adapters part of the weights, for good. The module is a plain one again, its layers new."""
        tensors = {n: p.detach().cpu() for n, p in self.module.named_parameters() if n in self.trained}
        self._tensors = {_PREFIX + name.replace(f".{_NAME}.", "."): tensor for name, tensor in tensors.items()}
        device = next(self.module.parameters()).device
        self.module.cpu()
        self._tuner.merge_and_unload()
        self.module.to(device)
        self.merged = True

    def write(self, directory: Path) -> None:
        """PEFT's two files, of the tensors as they were merged."""
        config = self._tuner.peft_config[_NAME]
        config.target_modules = sorted(config.target_modules)  # a set has no order, and files are hashed
        config.modules_to_save, config.inference_mode = list(self._heads), True
        config.save_pretrained(str(directory))
        save_file(self._tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def require_peft() -> Any:
    """PEFT, which takes seconds to import and is needed for nothing else. Raises AdapterError without it."""
    try:
        import peft
    except ImportError as error:
        raise AdapterError(f"LoRA adapters need PEFT: {install('peft')}") from error
    return peft


def _head_names(module: nn.Module) -> list[str]:
    """The head by the names of its outermost modules: those outside the trunk, and BERT's pooler in it."""
    parts = {id(part) for part in head_modules(module)}
    trunk = f"{module.base_model_prefix}."
    names = [name for name, part in module.named_modules() if id(part) in parts]
    return sorted({name if name.startswith(trunk) else name.partition(".")[0] for name in names})


def _plain(name: str) -> str:
    """A weight's name in a file of PEFT's and in memory, without that in which the two differ."""
    parts = (part for part in name.split(".") if part not in (_NAME, "modules_to_save", "base_layer"))
    return ".".join(parts).removesuffix(".weight")
