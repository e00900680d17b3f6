"""`plaudit model export --onnx`: a checkpoint of its own whose graph was compared before anything was kept.

The new directory holds every file of the old one, the graph, `onnx.json` (`onnx_trunk.GraphProof`) and a contract
that says backend, dtype and mode, and in `lineage.export` how the graph was made and how it compares. The comparison
is with plain eager fp32 transformers, on the items of the proof and on text. All is written aside; what passes, and
loads as a server would load it, gets its name.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from . import contract as contracts
from . import store
from .contract import RewardContract, Serving
from .encode import Encoder
from .errors import ModelError
from .infer import contract_for
from .onnx_graph import quantise, trace
from .onnx_trunk import GRAPH, PROOF, GraphProof, OnnxTrunk
from .oracle import KENDALL_FLOOR, Agreement, PlainModel, agreement
from .proof import plain_scores, proof_items
from .records import Conversation
from .reward_model import RewardModel

_OWN_FILES = (GRAPH, f"{GRAPH}.data", PROOF)


class ParityError(ModelError):
    """An exported graph does not score as the model does. Nothing was written."""

    exit_code = 1


@dataclass(frozen=True)
class ExportOptions:
    """dtype float32 or int8; mode as of the contract unless given; `allow_drift` keeps what failed the comparison and
    records that it did."""

    dtype: str = "float32"
    mode: str | None = None
    allow_drift: bool = False


def export_onnx(
    directory: Path,
    out: Path,
    options: ExportOptions,
    conversations: Sequence[Conversation],
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Agreement, str]:
    """Write the export of a checkpoint directory to `out`, whole or not at all. Returns how it compares with the
    model, and its numerics.

    Raises ParityError where the scores drift, CheckpointError and ContractError where the model or its export cannot
    be loaded, ItemError for text that the model cannot read.
    """
    contract = contract_for(directory)
    serving = Serving("onnx", options.dtype, options.mode or contract.serving.mode)  # type: ignore[arg-type]
    store.check_weights(directory)
    store.check_files(directory, contract)
    encoder = Encoder.open(directory, contract)
    encoded = [encoder.encode(prompt, response) for prompt, response in conversations]
    say("scoring with plain transformers")
    plain = PlainModel(directory)
    items = proof_items(plain.module, contract)
    expected = plain_scores(plain.module, contract)
    reference = np.concatenate([expected, plain.score(conversations)]) if conversations else expected
    with store.atomic_directory(out) as staging:
        _copy(directory, staging, [name for name in contract.files if name not in _OWN_FILES])
        say("tracing the graph, about a minute")
        record = _write_graph(directory, contract, plain.module, staging, serving.dtype)
        say("comparing")
        graph = OnnxTrunk(staging / GRAPH, device="cpu", dtype=serving.dtype, exact=serving.mode == "exact")
        model = RewardModel(
            plain.module, contract, directory, device="cpu", dtype=serving.dtype, mode=serving.mode, graph=graph
        )
        result = _compare(model.score_encoded([*items, *encoded]), reference, serving.dtype)
        if not (result.holds or options.allow_drift):
            raise ParityError(f"{_verdict(result)}. Nothing was written")
        if serving.dtype == "int8":
            expected = np.concatenate([model.score_encoded([item]) for item in items])
        GraphProof(record.get("reduce_range"), tuple(items), expected).write(staging)
        made = {"of": {"name": directory.name, "revision": contract.revision()}, "graph": record}
        made["parity"] = {**asdict(result), "holds": result.holds}
        lineage = {**contract.lineage, "export": made}
        contracts.write(replace(contract, serving=serving, lineage=lineage, files=store.hash_files(staging)), staging)
        RewardModel.load(staging, device="cpu")
    return result, model.numerics


def _write_graph(
    directory: Path, contract: RewardContract, module: nn.Module, staging: Path, dtype: str
) -> dict[str, Any]:
    """The graph in `staging`, and the record of how it was made. That of an fp32 export is not traced again."""
    with tempfile.TemporaryDirectory(dir=staging) as folder:
        traced = Path(folder) / GRAPH
        if contract.serving.backend == "onnx" and contract.serving.dtype == "float32":
            _copy(directory, traced.parent, [name for name in contract.files if name.startswith(GRAPH)])
            record = dict(contract.lineage["export"]["graph"])
        else:
            record = trace(module, traced, pooling=contract.pooling)
        if dtype == "int8":
            return record | quantise(traced, staging / GRAPH)
        for path in traced.parent.iterdir():
            path.rename(staging / path.name)
    return record


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _compare(ours_NA: NDArray[np.float32], reference_NA: NDArray[np.float32], dtype: str) -> Agreement:
    """The attribute that agrees least: one that fails if any does."""
    each = [agreement(ours, theirs, dtype) for ours, theirs in zip(ours_NA.T, reference_NA.T, strict=True)]
    return min(each, key=lambda one: (one.holds, one.kendall_tau))


def _verdict(result: Agreement) -> str:
    bound = f"floor {KENDALL_FLOOR}" if result.dtype == "int8" else f"tolerance {result.tolerance:.2g}"
    return (
        f"the {result.dtype} graph drifts from the model over {result.n} items: max |difference| "
        f"{result.max_difference:.3g} at sd {result.std:.3g}, Kendall tau {result.kendall_tau:.4f} ({bound}), order "
        f"flips in {result.flips} of {result.far_pairs} pairs farther apart than {2 * result.tolerance:.2g}"
    )
