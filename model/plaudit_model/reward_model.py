"""A reward model in memory: load, score, save. The same object trains and serves."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn

from plaudit_kernels import BLOCK, Choice, cpu_runtime, fast_choice, select

from . import contract as contracts
from . import store
from .adapter import Adapter
from .base import check_module, check_vocabulary, load_base, load_module, quiet, skeleton_of, token_ids
from .build import kernel_build
from .contract import ADAPTER_FILE, EIGHT_BITS, FILE_NAME, RewardContract, Serving
from .decoder import DecoderTrunk
from .encode import Encoded, Encoder
from .encoder_trunk import EncoderTrunk
from .errors import AdapterError, ContractError
from .footprint import Room
from .graphs import CudaRecorder, Graphs
from .heads import head_modules, is_known
from .infer import check_base, contract_for, is_adapter, resolve, tokenizer_home
from .laps import Laps
from .module_trunk import ModuleTrunk
from .packing import PackedBatch, group_items, pack, split_by_budget
from .proof import plain_scores, proof_items, prove
from .readback import Readback
from .trunk import Trunk, head_width, lacks_layers, make_trunk, padded_instead

if TYPE_CHECKING:
    from .onnx_trunk import OnnxTrunk


DTYPES = dict.fromkeys(("bfloat16", "fp8", "int8"), torch.bfloat16) | {"float32": torch.float32}
"""What torch's trunk computes in, matrix products in fp8 aside."""

_AS_STORED = (("bfloat16", torch.bfloat16), ("float32", torch.float32))
"""Serving dtypes whose weights take as much memory on the device as they did in the file."""

_SHARD = "5GB"
"""Weights are written in files of this size, which are hashed and read side by side."""

_OWN_FILES = (FILE_NAME, ADAPTER_FILE, "config.json")
_SIDE_FILES = ("*.json", "*.jinja", "*.txt", "*.model")


class RewardModel:
    """A sequence classifier of transformers with its contract, its encoder and a packed forward. `adapter` is what
    `adapt` attached, if it was called."""

    def __init__(
        self,
        module: nn.Module,
        contract: RewardContract,
        directory: Path,
        *,
        device: str,
        dtype: str,
        mode: str,
        graph: OnnxTrunk | None = None,
    ) -> None:
        """`graph` scores in the place of the module, which then has no weights: it is on torch's meta device."""
        self.contract = contract
        self.directory = directory
        self.adapter: Adapter | None = None
        self.encoder = Encoder.open(directory, contract)
        check_vocabulary(module, self.encoder, directory)
        self.device, self.dtype, self.mode = device, dtype, mode
        self.module = module
        self.choice: Choice | None = None  # of kernels, where the trunk is torch's
        self.trunk: Trunk
        self.laps = Laps()
        self._frozen = False
        self._graphs: Graphs | None = None
        if graph is not None:
            self.trunk, self.runtime = graph, graph.runtime
            return
        if torch.device(device).type == "cuda" and torch.device(device).index is not None:
            torch.cuda.set_device(device)  # where Triton launches, whatever device its tensors are on
        self.module = _cast(module, DTYPES[dtype])
        if dtype not in EIGHT_BITS:  # those are moved as they are frozen: see projection.EightBits
            self.module.to(device)
        self.module.requires_grad_(True).eval()
        self.trunk = self._make_trunk()
        self.choice = select(torch.device(device))
        if mode == "fast" and self.trunk.reason.startswith("packed"):
            self.choice = fast_choice(torch.device(device), DTYPES[dtype], head_width(module.config))
        self.runtime = f"torch{torch.__version__}-transformers{transformers.__version__}"

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str = "auto",
        dtype: str | None = None,
        mode: str | None = None,
        room: Room | None = None,
    ) -> RewardModel:
        """The reward model in a directory, on the Hub, or the fitted `starter`; None means as its contract says. An
        adapter is merged into its base. One that needs more than `room` is refused (ModelError).

        Raises CheckpointError for missing or changed files and pickle weights, ContractError for a fresh head,
        a contract that contradicts the weights, or scores that depend on the batch, AdapterError for an adapter
        without a trained head or with another base.
        """
        laps = Laps()
        directory = resolve(name)
        contract = contract_for(directory)
        serving = replace(contract.serving, **_given(dtype=dtype, mode=mode))
        load = cls._load_graph if serving.backend == "onnx" else cls._load_module
        with ExitStack() as stack:
            if (directory / FILE_NAME).is_file():  # an inferred contract was made from these very files
                stack.enter_context(store.checking_files(directory, contract))
                check_base(directory, contract)
            model = load(directory, contract, serving, device, room or Room(0), laps)
        laps.lap("proof")
        model.laps = laps
        return model

    @classmethod
    def _load_module(
        cls, directory: Path, contract: RewardContract, serving: Serving, device: str, room: Room, laps: Laps
    ) -> RewardModel:
        """Through layers of ours or transformers' own, with the weights of a module of transformers."""
        adapter = Adapter.open(directory, contract) if is_adapter(directory) else None
        module = adapter.module if adapter else load_module(directory)
        check_module(module, contract, directory)
        room.check(module, serving.dtype)
        device, stored = choose_device(device), next(module.parameters()).dtype
        if not adapter and (serving.dtype, stored) in _AS_STORED:
            module.to(device)  # a plain forward on the host would take longer than all else
        laps.lap("load")
        reference = plain_scores(module, contract)
        if adapter:  # what is served is merged, and proven against PEFT's own forward
            adapter.merge()
        if not is_known(module) and serving.dtype != "float32":
            raise ContractError(f"{contract.architecture} runs through its own head, which needs --dtype float32")
        laps.lap("proof")
        model = cls(module, contract, directory, device=device, dtype=serving.dtype, mode=serving.mode)
        model.freeze()
        laps.lap("load")
        model._prove(reference, stored)
        return model

    @classmethod
    def _load_graph(
        cls, directory: Path, contract: RewardContract, serving: Serving, device: str, room: Room, laps: Laps
    ) -> RewardModel:
        """An exported model. Its safetensors stay on the disk: they are for people, other tools and `verify`."""
        from .onnx_trunk import GRAPH, GraphProof, OnnxTrunk, check_machine

        if GRAPH not in contract.files:
            raise ContractError(f"the contract of {directory} says onnx and lists no {GRAPH}; was reward.json edited?")
        if serving.dtype != contract.serving.dtype:
            raise ContractError(
                f"{directory} was exported in {contract.serving.dtype} and has no other dtype; for {serving.dtype}: "
                f"plaudit model export --onnx {directory} --dtype {serving.dtype} --out DIR"
            )
        skeleton = skeleton_of(directory, contract)
        room.check(skeleton, serving.dtype)
        proof = GraphProof.read(directory)
        check_machine(proof)
        device = "cpu" if (device, serving.dtype) == ("auto", "int8") else choose_device(device)
        graph = OnnxTrunk(directory / GRAPH, device=device, dtype=serving.dtype, exact=serving.mode == "exact")
        options = {"device": device, "dtype": serving.dtype, "mode": serving.mode}
        model = cls(skeleton, contract, directory, **options, graph=graph)
        laps.lap("load")
        prove(model, proof.items, proof.scores)
        return model

    @classmethod
    def from_base(
        cls, name: str | Path, *, seed: int, max_length: int | None = None, dtype: str = "float32", device: str = "auto"
    ) -> RewardModel:
        """A model to be trained, from any checkpoint of a supported architecture: its head is kept if it has one
        of one output, else it is fresh. A directory with a configuration and no weights starts from scratch. An
        architecture without layers of ours is proven here, as it is at every load."""
        directory = resolve(name)
        module, contract = load_base(directory, seed=seed, max_length=max_length)
        reference = plain_scores(module, contract) if lacks_layers(module.config) else None
        serving = Serving(dtype="bfloat16" if dtype == "bfloat16" else "float32")
        contract = replace(contract, serving=serving, statistics=None, calibration=None, files={})
        model = cls(module, contract, directory, device=choose_device(device), dtype=dtype, mode="exact")
        if reference is not None:
            model._prove(reference, torch.float32)
        return model

    def adapt(self, base: str, *, seed: int, **settings: Any) -> None:
        """Train LoRA adapters and the head from now on, and nothing else. `base` is the name that this was made from;
        for `settings` see `Adapter.attach`. Raises AdapterError."""
        if not any(self.directory.glob("*.safetensors")):
            raise AdapterError(f"{base} has no weights: adapters are an addition to a trained base; train it whole")
        on_hub = "/" in base and not Path(base).is_dir()
        name = base if on_hub else str(self.directory.absolute())
        self.adapter = Adapter.attach(self.module, base=name, seed=seed, **settings)
        self.trunk = self._make_trunk()
        self._require_gradients()
        self.module.eval()

    @property
    def shares_prompt(self) -> bool:
        """Whether a common prompt is computed once."""
        return self.trunk.shares_prompt

    @property
    def path_reason(self) -> str:
        """Which path the forward takes, and why."""
        return f"{self.trunk.reason}; {self.choice.reason}" if self.choice else self.trunk.reason

    @property
    def sharing(self) -> str:
        """What `/info` says of prompt sharing."""
        if self.shares_prompt:
            return "prompts"
        packed = self.trunk.reason.startswith("packed")
        return "n/a: a bidirectional prompt depends on its response" if packed else "n/a: padded"

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def trained_parameters(self) -> int:
        """Number of those that are trained."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    @property
    def numerics(self) -> str:
        """Everything that the bits of a score depend on besides the model: an id, equal on equal replicas."""
        kind = torch.device(self.device).type
        if kind == "cpu":
            unit = cpu_runtime.unit(DTYPES[self.dtype] if self.choice else torch.float32)
        else:
            unit = torch.cuda.get_device_name(self.device).replace(" ", "_")
        runtime, padded = self.runtime, "" if self.trunk.reason.startswith("packed") else "-padded"
        if self.choice:
            runtime += f"-triton{metadata.version('triton')}" if self.choice.implementation == "triton" else ""
            padded += f"-{self.choice.implementation}{self.choice.library}.{kernel_build()}"
        return f"{runtime}-{kind}.{unit}-{self.dtype}-{self.mode}-b{BLOCK}{padded}"

    @property
    def pad_token_id(self) -> int | None:
        """The id that plain transformers would skip when it pools."""
        return getattr(self.module.config, "pad_token_id", None)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids of the end of a turn that the configuration names."""
        return token_ids(getattr(self.module.config, "eos_token_id", None))

    def freeze(self) -> None:
        """Weights will not change any more: they are laid out for speed, and there are no gradients. Adapters become
        part of them, for good."""
        if self.adapter and not self.adapter.merged:
            self.adapter.merge()
            self.trunk = self._make_trunk()
        self.module.requires_grad_(False)
        self.trunk.freeze()
        self.module.to(self.device)
        self._frozen, self._graphs = True, None

    def record(self, token_budget: int, tell: Callable[[str], None]) -> None:
        """Have CUDA replay the forward of small batches (see `graphs`), where the model is frozen and computed by
        layers of ours. `tell` is told what was recorded, in a line."""
        device = torch.device(self.device)
        fused = device.type == "cuda" and self.choice is not None and self.choice.implementation == "triton"
        if fused and self._frozen and isinstance(self.trunk, (DecoderTrunk, EncoderTrunk)):
            self._graphs = Graphs(self.trunk, device, CudaRecorder(device))
            self._graphs.record(token_budget, tell)

    def train_mode(self, *, gradient_checkpointing: bool = False) -> None:
        """Ready for training; with gradient checkpointing, layers are computed once more in the backward pass. Dropout
        stays off: the two responses of a pair must see the same network. Raises ContractError as `Trunk.recompute`."""
        if self.adapter and self.adapter.merged:
            raise AdapterError("the adapters are merged and cannot be trained any more")
        self.trunk.thaw()
        self.trunk.recompute(gradient_checkpointing)
        self._frozen, self._graphs = False, None
        self._require_gradients()
        self.module.train()

    def eval_mode(self) -> None:
        self.module.eval()

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Attributes (N, A) fp32, with gradients where they are enabled; row i belongs to `batch.indices[i]`."""
        if self._graphs and torch.is_inference_mode_enabled() and (scores := self._graphs(batch)) is not None:
            return scores
        return self.trunk(batch)

    @torch.inference_mode()
    def score_encoded(self, items: Sequence[Encoded], *, token_budget: int = 4096) -> NDArray[np.float32]:
        """Attributes (N, A) fp32 in the caller's order, without gradients."""
        scores = np.empty((len(items), len(self.contract.head.attributes)), dtype=np.float32)
        launched: deque[tuple[NDArray[np.int64], Readback]] = deque()

        def read() -> None:
            indices, computed = launched.popleft()
            scores[indices] = computed.wait()

        for groups in split_by_budget(group_items(items, share=self.shares_prompt), token_budget):
            batch = pack(groups)
            launched.append((batch.indices, Readback(self.forward(batch))))
            if len(launched) > 1:  # a GPU computes this one while the last is read and the next is packed
                read()
        if launched:
            read()
        return scores

    def _prove(self, reference: NDArray[np.float32], stored: torch.dtype) -> None:
        """Prove the path. A module of transformers that does not hold packed runs padded, whatever went wrong: it met
        what its authors did not expect."""
        items = proof_items(self.module, self.contract)
        try:
            prove(self, items, reference, stored)
        except Exception as error:
            if not isinstance(self.trunk, ModuleTrunk) or isinstance(error, torch.OutOfMemoryError):
                raise
            self.trunk = padded_instead(self.trunk, error)
            prove(self, items, reference, stored)

    def save(self, directory: Path, contract: RewardContract, *, as_adapter: bool = False) -> None:
        """Write a checkpoint directory, atomically: weights as safetensors, configuration, tokenizer, and the
        contract with the sha256 of every other file. `as_adapter`, in place of the whole weights: the adapters and the
        head that were trained, as PEFT writes them."""
        quiet()
        if self.adapter and not self.adapter.merged:
            raise AdapterError("freeze the model before it is saved: its adapters are not merged")
        with self._written_out(), store.atomic_directory(directory) as staging:
            if as_adapter:
                assert self.adapter is not None, "there is no adapter to save"
                self.adapter.write(staging)
            else:
                self.module.save_pretrained(staging, max_shard_size=_SHARD)  # type: ignore[operator]
            for pattern in _SIDE_FILES:
                for path in tokenizer_home(self.directory).glob(pattern):
                    if path.name not in _OWN_FILES and not path.name.endswith(".index.json"):
                        shutil.copyfile(path, staging / path.name)
            if contract.template.kind == "chat":
                (staging / "chat_template.jinja").write_text(contract.template.source, encoding="utf-8")
            contract = replace(contract, files=store.hash_files(staging))
            contracts.write(contract, staging)
        self.contract = contract

    def _require_gradients(self) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(self.adapter is None or name in self.adapter.trained)

    def _make_trunk(self) -> Trunk:
        pooling, exact = self.contract.pooling, self.mode == "exact"
        return make_trunk(self.module, pooling=pooling, exact=exact, dtype=self.dtype, device=self.device)

    @contextmanager
    def _written_out(self) -> Iterator[None]:
        """The weights where transformers looks for them: a frozen trunk may keep them elsewhere, and graphs read them
        there."""
        self._graphs = None
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
