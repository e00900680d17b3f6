"""Scores by ONNX Runtime, over the graph that `plaudit model export --onnx` wrote.

In exact mode a sequence is computed alone: then its shapes, and in int8 the scales of its activations, which are one a
tensor, are its own. In fast mode sequences of like length share a right-padded batch, and an int8 score moves with the
company by the rounding of those scales. The CPU runs as many threads as torch was told to. On CUDA, products are fp32
proper (no TF32); int8 runs on CPUs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from plaudit._extras import install

from .encode import Encoded
from .errors import CheckpointError, ContractError
from .onnx_graph import saturates
from .packing import PackedBatch
from .padded_trunk import split_by_length, unpack

GRAPH = "model.onnx"
PROOF = "onnx.json"

Sequences = list[tuple[NDArray[np.int64], NDArray[np.int64]]]


@dataclass(frozen=True, eq=False)
class GraphProof:
    """`onnx.json`: what the graph must give wherever it is loaded, so that serving needs no other weights.

    reduce_range   int8 weights of 7 bits; None in float32
    scores         (N, A) of `items`: in float32 of plain eager transformers, in int8 of the graph where it was made
    """

    reduce_range: bool | None
    items: tuple[Encoded, ...]
    scores: NDArray[np.float32]

    @classmethod
    def read(cls, directory: Path) -> GraphProof:
        """Raises CheckpointError if the file is missing or broken."""
        path = directory / PROOF
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            items = (Encoded(np.array(row["input_ids"], np.int32), int(row["prompt_tokens"])) for row in data["items"])
            return cls(data["reduce_range"], tuple(items), np.array(data["scores"], dtype=np.float32))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is missing or broken ({error}); export the model again") from error

    def write(self, directory: Path) -> None:
        """Every float as the shortest decimal that reads back to the same bits."""
        items = [{"input_ids": item.ids.tolist(), "prompt_tokens": item.prompt_tokens} for item in self.items]
        data = {"reduce_range": self.reduce_range, "items": items, "scores": self.scores.astype(float).tolist()}
        (directory / PROOF).write_text(json.dumps(data) + "\n", encoding="utf-8")


class OnnxTrunk:
    """A graph in an ONNX Runtime session. Raises ContractError where this machine cannot run it as it was made."""

    shares_prompt = False

    def __init__(self, graph: Path, *, device: str, dtype: str, exact: bool) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ContractError(
                f"this model runs on ONNX Runtime, which is absent: {install('server,onnx')}"
            ) from error
        provider, options = _provider(torch.device(device), dtype)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.log_severity_level = 4
        try:
            self._session: Any = onnxruntime.InferenceSession(graph, settings, providers=[(provider, options)])
        except Exception as error:  # its exceptions have no class of their own
            raise CheckpointError(f"{graph} cannot be run: {' '.join(str(error).split())}") from error
        if self._session.get_providers()[0] != provider:
            raise ContractError(f"ONNX Runtime has no {provider} here (onnxruntime-gpu and CUDA); try --device cpu")
        self._inputs = {each.name for each in self._session.get_inputs()}
        self._exact = exact
        self.runtime = f"onnxruntime{onnxruntime.__version__}.{provider}"
        how = "one sequence at a time" if exact else "by length"
        self.reason = f"padded: ONNX Runtime {onnxruntime.__version__}, {provider}, {dtype} graph, {how}"

    def freeze(self) -> None:
        """A graph is frozen."""

    def thaw(self) -> None:
        raise ContractError("an exported graph cannot be trained")

    def recompute(self, on: bool) -> None:
        self.thaw()

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        sequences = unpack(batch)
        lengths = [len(ids) for ids, _ in sequences]
        rows = [[i] for i in range(len(sequences))] if self._exact else split_by_length(lengths)
        scores = np.concatenate([self._run([sequences[i] for i in some]) for some in rows])
        return torch.from_numpy(scores[np.argsort(np.concatenate(rows))])

    def _run(self, sequences: Sequences) -> NDArray[np.float32]:
        shape = len(sequences), max(len(ids) for ids, _ in sequences)
        arrays = {name: np.zeros(shape, dtype=np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
        for row, (ids, types) in enumerate(sequences):
            arrays["input_ids"][row, : len(ids)] = ids
            arrays["attention_mask"][row, : len(ids)] = 1
            arrays["token_type_ids"][row, : len(ids)] = types
        scores: NDArray[np.float32] = self._session.run(
            ["scores"], {name: array for name, array in arrays.items() if name in self._inputs}
        )[0]
        return scores


def check_machine(proof: GraphProof) -> None:
    """Raise ContractError if int8 products would saturate here, as they did not where the graph was made."""
    if proof.reduce_range is False and saturates():
        raise ContractError(
            "this int8 graph has weights of 8 bits, whose products saturate on x86 without VNNI, as here; export it on "
            "this machine, which gives weights of 7 bits"
        )


def _provider(device: torch.device, dtype: str) -> tuple[str, dict[str, Any]]:
    """ONNX Runtime's name of a device, with its options."""
    if device.type == "cpu":
        return "CPUExecutionProvider", {}
    if device.type != "cuda" or dtype == "int8":
        raise ContractError(f"a {dtype} graph does not run on {device.type}: use --device cpu")
    return "CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": 0}
