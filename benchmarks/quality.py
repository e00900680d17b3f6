"""What fewer bits cost on models that were fitted: the scores of held-out pairs in fp32, bf16 and 8 bits.

`starter`: the starter model on the conversations that were held out when it was fitted. `minilm`: MiniLM fitted on
UKPConvArg1 (as in convincing_arguments.py; --model takes one that is fitted already), on the strict pairs of debates
that it never saw. int8 is the export to ONNX Runtime made on this machine; fp8 and int8-weights are torch's, for
decoders. A row per dtype: how far its scores are from fp32, how many pairs that fp32 tells apart by more than twice the
tolerance of the dtype (`oracle.RELATIVE_TOLERANCE`) change sides, and the change in accuracy with a 95% bootstrap
interval of paired differences, clustered by conversation (starter) or by argument (minilm: two debates are too few to
resample).

    PLAUDIT_SHARED_DATA=... python benchmarks/quality.py --models starter minilm
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import convincing_arguments
import inputs
import numpy as np
import rows

from plaudit_model import contract as contracts
from plaudit_model.infer import resolve
from plaudit_model.onnx_export import ExportOptions, export_onnx
from plaudit_model.oracle import agreement
from plaudit_model.records import Record
from plaudit_model.reward_model import RewardModel
from plaudit_training import metrics
from plaudit_training.batches import encode_records
from plaudit_training.evaluate import Cluster, judge, score
from plaudit_training.sources import ReadOptions, load
from plaudit_training.split import split_by_conversation
from plaudit_training.starter_fit import SETTINGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["starter", "minilm"], default=["starter", "minilm"])
    parser.add_argument("--model", type=Path, help="a MiniLM that is fitted already")
    parser.add_argument("--records", type=int, help="at most as many held-out records")
    dtypes = ["bfloat16", "int8", "fp8", "int8-weights"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes[:2])
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument(
        "train_options", nargs="*", default=convincing_arguments.TRAIN_OPTIONS, help="of `plaudit train`, after --"
    )
    arguments = parser.parse_args()
    inputs.check(*(name for name in arguments.models if name == "starter" or not arguments.model))
    inputs.check(*["ukpconvarg1"] * ("minilm" in arguments.models), *["onnxruntime"] * ("int8" in arguments.dtypes))
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            if name == "starter":
                compare(
                    "starter", resolve("starter"), starter_held_out()[: arguments.records], "conversation", arguments
                )
                continue
            data = inputs.DATA / "ukpconvarg1"
            fitted = arguments.model or convincing_arguments.fit(
                data, Path(folder) / "run", arguments.seed, arguments.train_options
            )
            options = ReadOptions(format="ukpconvarg1", strict_ids=data / "dev.strict_ids.txt.gz")
            records = load([str(data / "dev.jsonl.gz")], options)[0][: arguments.records]
            compare("minilm on UKPConvArg1", fitted, records, "response", arguments)


def starter_held_out() -> list[Record]:
    """The conversations that `plaudit train starter` does not train on."""
    lineage = contracts.read(resolve("starter")).lineage["config"]
    options = ReadOptions(starter_records=SETTINGS["data.starter_records"], seed=lineage["seed"])
    return split_by_conversation(load(["starter"], options)[0], lineage["data"]["eval_share"], lineage["seed"])[1]


def compare(name: str, model: Path, records: list[Record], cluster: Cluster, arguments: argparse.Namespace) -> None:
    """A row for each dtype against fp32."""
    plain = RewardModel.load(model, dtype="float32")
    examples = encode_records(records, plain.encoder).examples
    reference = score(plain, examples, token_budget=4096)
    before = judge(examples, reference, cluster)
    for dtype, loaded in served(model, arguments.dtypes):
        found = score(loaded, examples, token_budget=4096)
        after = judge(examples, found, cluster)
        ours, theirs = (np.concatenate(scores).astype(np.float32) for scores in (found, reference))
        close = agreement(ours, theirs, loaded.dtype)
        far = np.abs(before.delta) > 2 * close.tolerance
        right, was_right = (judged.delta > 0 for judged in (after, before))
        paired = replace(before, chosen=right.astype(np.float64), rejected=was_right.astype(np.float64))
        change = metrics.evaluate(paired)["margin"]
        rows.append(
            "quality",
            {
                "model": name,
                "dtype": dtype,
                "responses": len(ours),
                "pairs": change.n,
                "fp32_sd": round(float(theirs.std()), 4),
                "max_difference": f"{np.abs(ours - theirs).max():.3g}",
                "sd_difference": f"{(ours - theirs).std():.3g}",
                "kendall_tau": round(close.kendall_tau, 5),
                "tolerance": round(close.tolerance, 4),
                "far_pairs": int(far.sum()),
                "far_flips": int((right != was_right)[far].sum()),
                "flips": int((right != was_right).sum()),
                "fp32_accuracy": round(float(was_right.mean()), 4),
                "accuracy": round(float(right.mean()), 4),
                **{f"change_{part}": _rounded(getattr(change, part)) for part in ("value", "low", "high")},
                "cluster": cluster,
                "numerics": loaded.numerics,
            },
        )


def served(model: Path, dtypes: list[str]) -> Iterator[tuple[str, RewardModel]]:
    """The model in each dtype, as it is served. int8 says how many bits its weights have here."""
    for dtype in dtypes:
        if dtype != "int8":
            yield dtype, RewardModel.load(model, dtype=dtype.removesuffix("-weights"))
            continue
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(model, Path(folder) / "int8", ExportOptions("int8", allow_drift=True), [])
            loaded = RewardModel.load(Path(folder) / "int8")
            narrow = loaded.contract.lineage["export"]["graph"]["reduce_range"]
            yield f"int8, weights of {7 if narrow else 8} bits", loaded


def _rounded(value: float | None) -> float | str:
    return "" if value is None else round(value, 4)


if __name__ == "__main__":
    main()
