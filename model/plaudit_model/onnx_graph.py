"""A reward model as one ONNX graph: token ids in, attributes out, the head included.

Inputs, all int64: `input_ids`, `attention_mask` and, where the model has token types, `token_type_ids`, each (B, L),
right-padded. Outputs, fp32: `scores` (B, A), and `pooled` (B, d), the hidden state that the head reads (not there where
the head is the architecture's own). It is pooled by position, the last or the first token that the mask keeps.

int8 is ONNX Runtime's dynamic quantisation of the products with a constant matrix: the projections of attention and
of the feed-forward. Their weights are int8, a scale for each output channel; their inputs are rounded to uint8 as they
come, one scale a tensor. Embeddings, norms, the products of attention itself (queries with keys, probabilities with
values) and the head stay fp32. x86 without VNNI adds two products of bytes in 16 bits, which saturates; a graph made
on such a machine has weights of 7 bits (`reduce_range`), which cannot, and which score a little differently.
"""

from __future__ import annotations

import logging
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from plaudit._extras import install

from .errors import ContractError
from .heads import head_layers, is_known, last_hidden_state

OPSET = 20
_PRODUCTS = ("MatMul", "Gemm")
_CPU_FLAGS = Path("/proc/cpuinfo")


def trace(module: nn.Module, path: Path, *, pooling: str) -> dict[str, Any]:
    """Write the fp32 graph of a classifier that is in fp32 with eager attention; larger than 2 GB, with its weights
    in `<path>.data` beside it. Returns the record of what it was made with.

    Raises ContractError where the packages are missing or the architecture cannot be traced.
    """
    if not is_known(module) and pooling != "first":
        raise ContractError(f"{type(module).__name__} has a head of its own over its last token: not exported")
    try:
        import onnx
        import onnxscript
    except ImportError as error:
        raise ContractError(f"exporting needs {error.name}, which is not here: {install('server,onnx')}") from error
    with _quiet():
        try:
            _traced(module, pooling).save(path)
        except torch.onnx.OnnxExporterError as error:
            raise ContractError(f"torch cannot trace {type(module).__name__}: {error}") from error
    made_with = {"torch": torch, "transformers": transformers, "onnx": onnx, "onnxscript": onnxscript}
    return {"opset": OPSET, **{name: package.__version__ for name, package in made_with.items()}}


def quantise(source: Path, target: Path) -> dict[str, Any]:
    """Write the int8 graph of an fp32 graph. Returns the record of how. Raises ContractError for a head that is the
    architecture's own: it cannot be told from the rest, and must not be rounded."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    model = onnx.load(source, load_external_data=False)
    if not any(output.name == "pooled" for output in model.graph.output):
        raise ContractError("this architecture runs through its own head, which needs --dtype float32")
    model.graph.ClearField("value_info")  # the quantiser transposes weights and would be told their old shapes
    onnx.save(model, source)
    head = _downstream(model.graph, "pooled")
    products = [node for node in model.graph.node if node.op_type in _PRODUCTS and not head & set(node.output)]
    narrow = saturates()
    with _quiet():
        quantize_dynamic(
            source, target, op_types_to_quantize=["MatMul"], per_channel=True, reduce_range=narrow,
            nodes_to_quantize=[node.name + "_MatMul" * (node.op_type == "Gemm") for node in products],  # as it renames
            use_external_data_format=source.with_name(source.name + ".data").exists(),
        )  # fmt: skip
    done = onnx.load(target, load_external_data=False).graph.node
    count = sum(node.op_type == "MatMulInteger" for node in done)
    return {"int8_products": count, "reduce_range": narrow, "onnxruntime": onnxruntime.__version__}


def saturates() -> bool:
    """Whether this machine's int8 products saturate at 16 bits: x86 without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not _CPU_FLAGS.is_file() or not {"avx512_vnni", "avx_vnni"} & set(_CPU_FLAGS.read_text().split())


class _Scores(nn.Module):
    """What is traced."""

    def __init__(self, module: nn.Module, pooling: str) -> None:
        super().__init__()
        self.module = module
        self._last = pooling == "last"

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if not is_known(self.module):
            return (self.module(**inputs).logits,)
        hidden_BLd = last_hidden_state(self.module, **inputs)
        if not self._last:
            pooled_Bd = hidden_BLd[:, 0]
        else:
            rows_B = attention_mask.sum(1) - 1
            pooled_Bd = hidden_BLd.gather(1, rows_B[:, None, None].expand(-1, -1, hidden_BLd.shape[-1])).squeeze(1)
        return head_layers(self.module, pooled_Bd), pooled_Bd


def _traced(module: nn.Module, pooling: str) -> Any:
    config: Any = module.config
    config.use_cache = False
    mask = torch.ones(2, 7, dtype=torch.int64)  # sizes that differ and are not 1, or the tracer would fix them
    mask[1, 5:] = 0
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
    if int(getattr(config, "type_vocab_size", 0) or 0) > 1:
        inputs["token_type_ids"] = torch.zeros_like(mask)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return torch.onnx.export(
        _Scores(module, pooling).eval(), tuple(inputs.values()), dynamic_shapes=(axes,) * len(inputs),
        input_names=list(inputs), output_names=["scores", "pooled"] if is_known(module) else ["scores"],
        dynamo=True, opset_version=OPSET, verbose=False,
    )  # fmt: skip


def _downstream(graph: Any, name: str) -> set[str]:
    """The values that are computed from one value. The nodes of a graph are in the order of computation."""
    reached = {name}
    for node in graph.node:
        if reached & set(node.input):
            reached |= set(node.output)
    return reached - {name}


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter and the quantiser talk about their insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
