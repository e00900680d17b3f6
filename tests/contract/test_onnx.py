"""ONNX Runtime as the second backend, all the way: export, comparison, refusal, offline scores, a real server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from plaudit_model import cli, cli_model, onnx_trunk, store
from plaudit_model import contract as contracts
from plaudit_model.encode import Encoded
from plaudit_model.errors import CheckpointError, ContractError
from plaudit_model.oracle import PlainModel, agreement
from plaudit_model.reward_model import RewardModel

onnx = pytest.importorskip("onnx")

FAMILIES = ("qwen3", "bert")
DTYPES = ("float32", "int8")
EACH = pytest.mark.parametrize(("family", "dtype"), [(f, d) for f in FAMILIES for d in DTYPES])
Exports = dict[tuple[str, str], Path]


def export(source: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(cli_model.app, ["export", str(source), "--onnx", "--out", str(out), "--json", *options])


@pytest.fixture(scope="module")
def sources(write_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One-layer models: tracing takes seconds a layer."""
    made = {}
    for family in FAMILIES:
        base = tmp_path_factory.mktemp("base") / family
        shutil.copytree(write_base(family), base)
        config = json.loads((base / "config.json").read_text())
        config |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
        (base / "config.json").write_text(json.dumps(config))
        model = RewardModel.from_base(base, seed=3)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for weight in (p for p in model.module.parameters() if p.dim() == 2):
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
        made[family] = tmp_path_factory.mktemp("models") / family
        model.save(made[family], model.contract)
    return made


@pytest.fixture(scope="module")
def exports(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Each model in fp32, and in int8 from that export: a graph is traced once."""
    made: Exports = {}
    for family in FAMILIES:
        for dtype, source in (("float32", sources[family]), ("int8", None)):
            out = tmp_path_factory.mktemp("exports") / f"{family}-{dtype}"
            result = export(source or made[family, "float32"], out, "--dtype", dtype)
            assert result.exit_code == 0, result.output
            made[family, dtype] = out
    return made


def items_of(model: RewardModel, n: int = 24) -> list[Encoded]:
    """Three prompts; lengths from one token to several blocks."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(5, 600, length, dtype=np.int32) for length in (16, 70, 100)]
    lengths = [1, 2, *rng.integers(3, 200, n - 2).tolist()]
    own = [rng.integers(5, 600, length, dtype=np.int32) for length in lengths]
    return [Encoded(np.concatenate([prompts[i % 3], ids]), len(prompts[i % 3])) for i, ids in enumerate(own)]


@EACH
def test_an_export_is_a_checkpoint_of_its_own(
    exports: Exports, sources: dict[str, Path], family: str, dtype: str
) -> None:
    source, out = sources[family], exports[family, dtype]
    was, now = contracts.read(source), contracts.read(out)
    assert now.serving == contracts.Serving("onnx", dtype, "exact")  # type: ignore[arg-type]
    assert now.files == store.hash_files(out) and set(now.files) - set(was.files) == {"model.onnx", "onnx.json"}
    assert {name: now.files[name] for name in was.files} == was.files
    assert now.revision() != was.revision()
    made = now.lineage["export"]
    assert made["parity"]["holds"] and made["parity"]["n"] == 75
    assert ("int8_products" in made["graph"]) == (dtype == "int8")
    ours, model = RewardModel.load(out), RewardModel.load(source)
    items = items_of(model)
    assert agreement(ours.score_encoded(items)[:, 0], model.score_encoded(items)[:, 0], dtype).holds
    assert ours.parameters == model.parameters and not ours.shares_prompt
    assert "CPUExecutionProvider" in ours.path_reason and f"{dtype}-exact" in ours.numerics
    assert all(p.is_meta for p in ours.module.parameters())  # the weights are in the graph alone
    assert PlainModel(out).module is not None


def test_the_head_is_not_rounded_and_attention_is_not(exports: Exports) -> None:
    graph = onnx.load(exports["qwen3", "int8"] / "model.onnx").graph
    rounded = [node.name for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(rounded) == 7  # q, k, v, o, gate, up, down
    left = [node for node in graph.node if node.op_type == "MatMul"]
    constant = {tensor.name for tensor in graph.initializer}
    assert len(left) == 3 and [node.input[1] in constant for node in left] == [False, False, True]
    weights = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    scales = {t.name: t.dims for t in graph.initializer if t.name.endswith("_scale")}
    assert all(list(scales[t.name.replace("_quantized", "_scale")]) == [t.dims[1]] for t in weights)  # per channel


@EACH
def test_exact_scores_are_functions_of_the_item(exports: Exports, family: str, dtype: str) -> None:
    model = RewardModel.load(exports[family, dtype])
    items = items_of(model)
    together = model.score_encoded(items)
    alone = np.concatenate([model.score_encoded([item]) for item in items])
    order = np.random.default_rng(2).permutation(len(items))
    shuffled = model.score_encoded([items[i] for i in order])
    assert together.tobytes() == alone.tobytes() and shuffled.tobytes() == together[order].tobytes()
    assert RewardModel.load(exports[family, dtype]).score_encoded(items).tobytes() == together.tobytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_scores_move_with_the_batch_so_exact_ones_have_none(exports: Exports, family: str) -> None:
    """Equal lengths, nothing padded, and yet: the activations of a batch are rounded on one scale."""
    exact, fast = (RewardModel.load(exports[family, "int8"], mode=mode) for mode in ("exact", "fast"))
    rng = np.random.default_rng(3)
    items = [Encoded(rng.integers(5, 600, 50, dtype=np.int32), 0) for _ in range(8)]
    together = fast.score_encoded(items)
    assert not np.array_equal(together, exact.score_encoded(items))
    assert np.array_equal(fast.score_encoded(items[:1]), exact.score_encoded(items[:1]))


@EACH
def test_fast_mode_is_within_its_tolerance(exports: Exports, family: str, dtype: str) -> None:
    exact, fast = (RewardModel.load(exports[family, dtype], mode=mode) for mode in ("exact", "fast"))
    items = items_of(exact)
    assert agreement(fast.score_encoded(items)[:, 0], exact.score_encoded(items)[:, 0], dtype).holds
    assert "-fast-" in fast.numerics and "by length" in fast.path_reason


def test_served_over_http_as_it_scores_offline(serve: Callable[..., Any], exports: Exports) -> None:
    names = {f"{family}-{dtype}": path for (family, dtype), path in exports.items()}
    running = serve(*(f"{name}={path}" for name, path in names.items()))
    prompts = [("What is the best way to learn?", f"practise {'and read ' * i}daily") for i in range(6)]
    with httpx2.Client(base_url=running.url, timeout=60) as http:
        told = {model["model"]: model for model in http.get("/info").json()["models"]}
        for name, path in names.items():
            model = RewardModel.load(path)
            offline = model.score_encoded([model.encoder.encode(*prompt) for prompt in prompts])[:, 0]
            items = [{"prompt": prompt, "response": response} for prompt, response in prompts]
            answer = http.post("/score", json={"model": name, "items": items}).json()
            assert np.float32(answer["scores"]).tobytes() == offline.tobytes()
            assert answer["numerics"] == model.numerics
            assert told[name]["backend"] == "onnx" and told[name]["dtype"] == name.split("-")[1]
            assert "CPUExecutionProvider" in told[name]["path"] and told[name]["sharing"] == "n/a: padded"
    assert running.end() == 0


def test_offline_verify_and_info(exports: Exports) -> None:
    app = typer.Typer()
    app.command("info")(cli.info)
    app.command("verify")(cli.verify)
    for path in exports.values():
        found = CliRunner().invoke(app, ["verify", str(path), "--json", "--limit", "24"])
        assert found.exit_code == 0 and json.loads(found.stdout)["holds"], found.output
        assert json.loads(CliRunner().invoke(app, ["info", str(path), "--json"]).stdout)["serving"]["backend"] == "onnx"
    items = Path(exports["bert", "int8"].parent / "items.jsonl")
    items.write_text('{"prompt": "Hi", "responses": ["Hello", "No"]}\n')
    out = items.with_name("scores.jsonl")
    command = [sys.executable, "-P", "-c", "from plaudit.cli import main; main()", "score", str(items)]
    command += ["--out", str(out), "--model", str(exports["bert", "int8"])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = RewardModel.load(exports["bert", "int8"])
    expected = model.score_encoded([model.encoder.encode("Hi", text) for text in ("Hello", "No")])[:, 0]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert np.float32([row["score"] for row in written]).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["model.onnx", "onnx.json"])
def test_a_file_that_was_changed_is_refused(exports: Exports, tmp_path: Path, name: str) -> None:
    shutil.copytree(exports["qwen3", "float32"], tmp_path / "changed")
    with (tmp_path / "changed" / name).open("r+b") as stream:
        stream.seek(-40, 2)
        stream.write(b"bits")
    with pytest.raises(CheckpointError, match=rf"{name}.*sha256 differs"):
        RewardModel.load(tmp_path / "changed")


def spoilt(source: Path, target: Path, edit: Callable[[np.ndarray], np.ndarray]) -> Path:
    """A copy of an export whose first matrix of products is another, hashes and all."""
    shutil.copytree(source, target)
    model = onnx.load(target / "model.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    first = next(n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in tensors)
    tensor = tensors[first.input[1]]
    tensor.CopyFrom(onnx.numpy_helper.from_array(edit(onnx.numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(model, target / "model.onnx")
    contracts.write(replace(contracts.read(target), files=store.hash_files(target)), target)
    return target


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_graph_that_scores_otherwise_is_not_written(exports: Exports, tmp_path: Path, dtype: str) -> None:
    def edit(matrix: np.ndarray) -> np.ndarray:
        return -3 * matrix

    wrong = spoilt(exports["qwen3", "float32"], tmp_path / "wrong", edit)
    with pytest.raises(ContractError, match="scores differ from the plain model's"):
        RewardModel.load(wrong)
    result = export(wrong, tmp_path / "out", "--dtype", dtype)
    said = " ".join(str(result.exception).split())
    assert getattr(result.exception, "exit_code", None) == 1, result.output
    assert "max |difference|" in said and "Kendall tau" in said and "Nothing was written" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wrong"]


def test_drift_that_is_allowed_is_recorded(exports: Exports, tmp_path: Path) -> None:
    """One channel that no score depends on takes the scale of the activations: the others round to nothing."""

    def edit(matrix: np.ndarray) -> np.ndarray:
        return np.concatenate([1.5 * matrix[:1], matrix[1:]])

    wrong = spoilt(exports["qwen3", "float32"], tmp_path / "wrong", edit)
    assert export(wrong, tmp_path / "out", "--dtype", "int8", "--allow-drift").exit_code == 0
    parity = contracts.read(tmp_path / "out").lineage["export"]["parity"]
    assert not parity["holds"] and parity["kendall_tau"] < 0.95
    RewardModel.load(tmp_path / "out")
