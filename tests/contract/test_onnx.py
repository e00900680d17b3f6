"""ONNX Runtime as the second backend, all the way: export, comparison, refusal, offline scores, a real server."""

from __future__ import annotations

import json
import shutil
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

from plaudit_model import cli, cli_model, onnx_graph, onnx_trunk, store
from plaudit_model import contract as contracts
from plaudit_model.encode import Encoded
from plaudit_model.errors import CheckpointError, ContractError
from plaudit_model.onnx_export import ParityError
from plaudit_model.oracle import KENDALL_FLOOR, PlainModel, agreement
from plaudit_model.packing import group_items, pack
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
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for weight in (p for p in model.module.parameters() if p.dim() == 2):
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
        made[family] = tmp_path_factory.mktemp("models") / family
        model.save(made[family], model.contract)
    return made


@pytest.fixture(scope="module")
def exports(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Each model in fp32, and in int8 from that export: a graph is traced once. Weights of 7 bits, which give the same
    scores on every processor."""
    made: Exports = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "saturates", lambda: True)
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
    graph = exports[family, "int8"] / onnx_trunk.GRAPH
    exact, fast = (onnx_trunk.OnnxTrunk(graph, device="cpu", dtype="int8", exact=exact) for exact in (True, False))
    rng = np.random.default_rng(3)
    items = [Encoded(rng.integers(5, 600, 50, dtype=np.int32), 0) for _ in range(8)]
    eight, one = (pack(group_items(some, share=False)) for some in (items, items[:1]))
    assert not torch.equal(fast(eight), exact(eight))
    assert torch.equal(fast(one), exact(eight)[:1])


@pytest.mark.parametrize(("family", "dtype"), [("qwen3", "float32"), ("bert", "float32"), ("bert", "int8")])
def test_fast_mode_pads_and_stays_close(exports: Exports, family: str, dtype: str) -> None:
    exact, fast = (RewardModel.load(exports[family, dtype], mode=mode) for mode in ("exact", "fast"))
    items = items_of(exact)
    result = agreement(fast.score_encoded(items)[:, 0], exact.score_encoded(items)[:, 0], dtype)
    assert result.max_difference <= result.tolerance and result.flips == 0
    assert "-fast-" in fast.numerics and "by length" in fast.path_reason


def test_served_over_http_as_it_scores_offline(serve: Callable[..., Any], exports: Exports) -> None:
    both = ("qwen3", "int8"), ("bert", "float32")
    names = {"-".join(one): exports[one] for one in both}
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


def test_offline_verify_and_info(plaudit: Any, exports: Exports) -> None:
    app = typer.Typer()
    app.command("info")(cli.info)
    app.command("verify")(cli.verify)
    for path in exports.values():
        found = CliRunner().invoke(app, ["verify", str(path), "--json"])
        assert found.exit_code == 0 and json.loads(found.stdout)["holds"], found.output
        assert json.loads(CliRunner().invoke(app, ["info", str(path), "--json"]).stdout)["serving"]["backend"] == "onnx"
    items = Path(exports["bert", "int8"].parent / "items.jsonl")
    items.write_text('{"prompt": "Hi", "responses": ["Hello", "No"]}\n')
    out = items.with_name("scores.jsonl")
    code = plaudit.run("score", items, "--out", out, "--model", exports["bert", "int8"])
    assert code == 0, plaudit.stderr
    model = RewardModel.load(exports["bert", "int8"])
    expected = model.score_encoded([model.encoder.encode("Hi", text) for text in ("Hello", "No")])[:, 0]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert np.float32(written[0]["scores"]).tobytes() == expected.tobytes()


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
    wrong = spoilt(exports["qwen3", "float32"], tmp_path / "wrong", lambda matrix: -3 * matrix)
    assert export(wrong, tmp_path / "out", "--dtype", "int8", "--allow-drift").exit_code == 0
    parity = contracts.read(tmp_path / "out").lineage["export"]["parity"]
    assert not parity["holds"] and parity["kendall_tau"] < KENDALL_FLOOR
    RewardModel.load(tmp_path / "out")


@pytest.mark.soak
def test_outliers_that_int8_cannot_hold_are_refused(exports: Exports, tmp_path: Path) -> None:
    """One channel that no product reads takes the whole scale of the activations; the fp32 model does not notice."""
    source = exports["qwen3", "float32"]
    plain = PlainModel(source)
    with torch.no_grad():
        for layer in plain.module.model.layers:
            layer.input_layernorm.weight[0] = 1e4
            for product in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                product.weight[:, 0] = 0
    model = RewardModel(plain.module, plain.contract, source, device="cpu", dtype="float32", mode="exact")
    model.save(tmp_path / "outlier", replace(plain.contract, serving=contracts.Serving(), files={}))
    result = export(tmp_path / "outlier", tmp_path / "out", "--dtype", "int8")
    assert isinstance(result.exception, ParityError) and "the int8 graph drifts" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_8_bit_weights_are_refused_where_their_products_saturate(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_graph, "saturates", lambda: False)
    made = export(exports["bert", "float32"], tmp_path / "out", "--dtype", "int8", "--allow-drift")
    assert made.exit_code == 0 or onnx_trunk.saturates(), made.output
    shutil.copytree(exports["bert", "int8"], tmp_path / "wide")
    proof = onnx_trunk.GraphProof.read(tmp_path / "wide")
    replace(proof, reduce_range=False).write(tmp_path / "wide")
    contracts.write(
        replace(contracts.read(tmp_path / "wide"), files=store.hash_files(tmp_path / "wide")), tmp_path / "wide"
    )
    monkeypatch.setattr(onnx_trunk, "saturates", lambda: True)
    with pytest.raises(ContractError, match="VNNI"):
        RewardModel.load(tmp_path / "wide")


def test_weights_beside_the_graph(exports: Exports, tmp_path: Path) -> None:
    """As those of a graph that is larger than a protobuf may be."""
    source = tmp_path / "source"
    shutil.copytree(exports["bert", "float32"], source)
    model = onnx.load(source / "model.onnx")
    onnx.save(model, source / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    contracts.write(replace(contracts.read(source), files=store.hash_files(source)), source)
    for dtype in DTYPES:
        out = tmp_path / dtype
        assert export(source, out, "--dtype", dtype, "--allow-drift").exit_code == 0
        assert "model.onnx.data" in contracts.read(out).files
        assert (out / "model.onnx.data").stat().st_size > (out / "model.onnx").stat().st_size
        items = items_of(model := RewardModel.load(out))
        assert np.array_equal(
            model.score_encoded(items), RewardModel.load(exports["bert", dtype]).score_encoded(items)
        ) or not contracts.read(out).lineage["export"]["graph"].get("reduce_range", True)


def test_what_an_export_is_not_for_is_refused(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    float32, int8 = exports["qwen3", "float32"], exports["qwen3", "int8"]
    with pytest.raises(ContractError, match="float32 or int8, not bfloat16"):
        RewardModel.load(float32, dtype="bfloat16")
    with pytest.raises(ContractError, match=r"exported in int8 .*plaudit model export --onnx .* --dtype float32"):
        RewardModel.load(int8, dtype="float32")
    with pytest.raises(ContractError, match="train from the model it was made of"):
        RewardModel.from_base(int8, seed=0)
    with pytest.raises(ContractError, match="int8 graph does not run on cuda"):
        RewardModel.load(int8, device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(ContractError, match="no CUDAExecutionProvider here"):
            RewardModel.load(float32, device="cuda")
    shutil.copytree(float32, tmp_path / "unlisted")
    contracts.write(replace(contracts.read(float32), files={}), tmp_path / "unlisted")
    with pytest.raises(ContractError, match=r"lists no model\.onnx"):
        RewardModel.load(tmp_path / "unlisted")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ContractError, match=r"pip install .*\[server,onnx\]'"):
        RewardModel.load(float32)


def test_the_command_line_is_checked_first(
    plaudit: Any, exports: Exports, sources: dict[str, Path], tmp_path: Path
) -> None:
    there = export(sources["bert"], exports["bert", "int8"])
    assert there.exit_code == 2 and "there already" in " ".join(there.output.replace("│", " ").split())
    formatless = CliRunner().invoke(cli_model.app, ["export", str(sources["bert"]), "--out", str(tmp_path / "x")])
    assert formatless.exit_code == 2 and "--onnx" in formatless.output
    code = plaudit.run("serve", "--port", "0", exports["bert", "int8"], "--dtype", "float32")
    assert code == 78 and "was exported in int8" in plaudit.stderr, plaudit.stderr
