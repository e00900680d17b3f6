"""The benchmark of the card without a card: every section runs, nothing is recorded, and what is recorded on a card
can be resumed, judged and cut short."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SECTIONS = (
    "matrix", "correctness", "forward", "attention", "fused", "training", "invariant", "regroupings", "fp8", "http",
    "ready", "tune",
)  # fmt: skip
"""Those that measure something in a dry run; `sanitizer` needs a GPU."""


@pytest.fixture(scope="module")
def gpu_card() -> Any:
    return imported("gpu_card")


def imported(name: str) -> Any:
    sys.path.append(str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def run(results: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry-run", "--results", str(results), *arguments]
    path = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path, **environment}
    )


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    results = tmp_path_factory.mktemp("results")
    return run(results, "--sections", "all", "gluon"), results


def test_every_section_runs_without_a_card(dry: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, _ = dry
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for section in SECTIONS:
        part = done.stdout.split(f"== {section}\n")[1].split("\n== ")[0]
        assert "dry: what=" in part, f"{section} measured nothing"


def test_what_never_ran_on_a_card_is_left_out_unless_it_is_named(
    dry: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    chosen = imported("gpu").chosen(["all"])
    assert {*chosen} == {*SECTIONS, "sanitizer"} and chosen[:3] == ["matrix", "correctness", "regroupings"]
    part = dry[0].stdout.split("== gluon\n")[1].split("\n== ")[0]
    assert "not measured" in part and "dry: what=" not in part


def test_a_dry_run_records_nothing(dry: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, results = dry
    assert list(results.iterdir()) == []


def test_no_kernel_of_the_dry_run_is_wrong(dry: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    part = dry[0].stdout.split("== correctness\n")[1].split("\n== ")[0]
    judged = [line for line in part.splitlines() if "what=error over what is allowed" in line]
    assert len(judged) > 50 and not any("met=no" in line for line in judged)


def test_fused_kernels_are_right_in_the_interpreter(tmp_path: Path) -> None:
    done = run(tmp_path, "--section", "correctness", PLAUDIT_KERNELS="triton", TRITON_INTERPRET="1")
    lines = [line for line in done.stdout.splitlines() if line.startswith("dry:")]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(lines) > 15 and not any("met=no" in line for line in lines), "\n".join(lines)


def test_without_a_card_nothing_is_measured(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--section", "matrix", "--results", str(tmp_path)]
    paths = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1 and "no GPU" in done.stderr
    assert list(tmp_path.iterdir()) == []


def compiling(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu_compile.py"), *arguments]
    paths = os.pathsep.join(filter(None, (str(BENCHMARKS), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


for_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch was built for CUDA")
def test_a_torch_without_cuda_is_told_that_it_cannot_compile_for_a_card() -> None:
    done = compiling("--list")
    assert done.returncode == 1 and "built without CUDA" in done.stderr


@for_cuda
def test_kernels_of_a_card_are_known_without_one() -> None:
    told = compiling("--sections", "fp8", "regroupings", "--only", "fp8|bfloat16", "--list").stdout
    for kernel in ("attention_triton._forward", "matmul._described_product", "matmul._quantize", "int8._widen"):
        assert kernel in told, told
    assert "regroupings | BERT-base | 10,000 regroupings | bfloat16: plaudit_kernels.norm._forward" in told


@for_cuda
@pytest.mark.soak
def test_they_are_compiled_into_the_cache(tmp_path: Path) -> None:
    options = ("--sections", "invariant", "--only", "Qwen3-0.6B qkv", "--processes", "2")
    told = compiling(*options, TRITON_CACHE_DIR=str(tmp_path)).stdout
    assert "3 kernels" in told and "0 failed" in told
    assert len(list(tmp_path.glob("*/*.cubin"))) == 3


# -- rows ----------------------------------------------------------------------------------------------------


def bench(gpu_card: Any, results: Path, **options: Any) -> Any:
    return gpu_card.Bench(torch.device("cpu"), False, results, "abc1234", **options)


def recorded(results: Path) -> list[dict[str, str]]:
    with (results / "gpu.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_row_says_what_was_measured_where_and_whether_it_is_enough(gpu_card: Any, tmp_path: Path) -> None:
    rows = [
        gpu_card.Row("share", [0.5, 0.56, 0.6], "share", "copy", target=0.55, floor=0.45),
        gpu_card.Row("share", [0.4, 0.46, 0.5], "share", "copy", target=0.55, floor=0.45),
        gpu_card.Row("seconds", [11.0], "s", target=10.0, at_most=True),
        gpu_card.Row("rate", [3.0], "TFLOP/s"),
    ]
    bench(gpu_card, tmp_path).run(gpu_card.Case("fused", "norm", "8 rows"), lambda: rows)
    found = recorded(tmp_path)
    assert [row["met"] for row in found] == ["target", "floor", "no", ""]
    first = found[0]
    assert (first["section"], first["subject"], first["p50"], first["unit"]) == ("fused", "norm", "0.56", "share")
    assert first["commit"] == "abc1234" and first["card"] == "none" and first["torch"] == torch.__version__


def test_resume_goes_on_with_the_first_case_without_rows(gpu_card: Any, tmp_path: Path) -> None:
    asked: list[str] = []

    def measure(name: str) -> list[Any]:
        asked.append(name)
        return [gpu_card.Row("rate", [1.0], "x")]

    first = bench(gpu_card, tmp_path)
    first.run(gpu_card.Case("fused", "one", "8 rows"), lambda: measure("one"))
    again = bench(gpu_card, tmp_path, resume=True)
    for name in ("one", "two"):
        again.run(gpu_card.Case("fused", name, "8 rows"), lambda name=name: measure(name))
    assert asked == ["one", "two"]
    other = gpu_card.Bench(torch.device("cpu"), False, tmp_path, "another", True)
    other.run(gpu_card.Case("fused", "one", "8 rows"), lambda: measure("one"))
    assert asked == ["one", "two", "one"]


def test_shards_measure_every_case_once(gpu_card: Any, tmp_path: Path) -> None:
    for number in range(3):
        part = bench(gpu_card, tmp_path, shard=(number, 3))
        for wanted in ("[ce]", ""):
            part.look_for(f"fused . {wanted}")
            for name in "abcdefg":
                part.run(gpu_card.Case("fused", name, "8 rows"), lambda: [gpu_card.Row("rate", [1.0], "x")])
    assert sorted(row["subject"] for row in recorded(tmp_path)) == list("abcdefg")


def test_a_case_that_fails_leaves_no_row_and_the_next_is_measured(
    gpu_card: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = bench(gpu_card, tmp_path)

    def skipped() -> list[Any]:
        raise gpu_card.Skip("no tool")

    measured.run(gpu_card.Case("fused", "broken", "8 rows"), lambda: [1 / 0])
    measured.run(gpu_card.Case("fused", "nan", "8 rows"), lambda: [gpu_card.Row("rate", [float("nan")], "x")])
    measured.run(gpu_card.Case("fused", "absent", "8 rows"), skipped)
    measured.run(gpu_card.Case("fused", "whole", "8 rows"), lambda: [gpu_card.Row("rate", [1.0], "x")])
    assert [row["subject"] for row in recorded(tmp_path)] == ["whole"]
    assert [len(measured.failed), len(measured.skipped), len(measured.measured)] == [2, 1, 1]
    told = capsys.readouterr().out
    assert "ZeroDivisionError" in told and "not finite" in told and "no tool" in told


def test_a_case_can_be_left_out_and_a_lost_card_ends_the_run(gpu_card: Any, tmp_path: Path) -> None:
    measured = bench(gpu_card, tmp_path, without="^fused . hangs")
    for name in ("hangs", "whole", "lost", "after"):
        measured.lost = name in ("lost", "after")
        measured.run(gpu_card.Case("fused", name, "8 rows"), lambda: [gpu_card.Row("rate", [1.0], "x")])
    assert [row["subject"] for row in recorded(tmp_path)] == ["whole"]


def test_no_case_begins_that_would_end_too_late(gpu_card: Any, tmp_path: Path) -> None:
    late = bench(gpu_card, tmp_path, deadline=0.0)
    late.run(gpu_card.Case("fused", "one", "8 rows"), lambda: [gpu_card.Row("rate", [1.0], "x")])
    assert late.left == ["fused | one | 8 rows | bfloat16"] and not list(tmp_path.iterdir())


def test_works_that_are_raced_are_paired(gpu_card: Any, tmp_path: Path) -> None:
    order: list[str] = []
    works = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    taken = bench(gpu_card, tmp_path).race_walls(works, rounds=3)
    assert order == ["a", "b"] * 5 and [len(seconds) for seconds in taken.values()] == [3, 3]
