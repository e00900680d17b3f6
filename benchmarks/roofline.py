"""How much of the machine's arithmetic the forward reaches, in this process, without HTTP.

The floor is computed: the matrix products that a batch needs, each at the rate measured for its own shape in the same
run, one after another and nothing else. `of_shapes` is that floor over the time of the forward; `of_square` is the
rate of the forward, in products and attention that are needed, over the rate of a 2048^3 product. Batches: a prompt of
120 tokens with 16 responses of 60, and pairs of real length without a shared prompt. Rounds alternate.

    python benchmarks/roofline.py --rounds 12
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import inputs
import numpy as np
import rows
import torch
from flops import flops_of, products_over_all_rows
from numpy.typing import NDArray
from parity import write_minilm
from shapes import write_decoder_25m
from torch import nn

from plaudit_kernels import FrozenLinear
from plaudit_model.encode import Encoded
from plaudit_model.memory import keep_freed_memory
from plaudit_model.packing import PackedBatch, group_items, pack
from plaudit_model.reward_model import RewardModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=["decoder", "minilm"], default=["decoder", "minilm"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    inputs.check(*arguments.models)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    makers = {"decoder": write_decoder_25m, "minilm": write_minilm}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            directory = makers[name](Path(folder) / name)
            for dtype in arguments.dtypes:
                for load, items in LOADS.items():
                    measure(name, directory, dtype, load, items(), arguments)


def measure(
    name: str, directory: Path, dtype: str, load: str, items: list[Encoded], arguments: argparse.Namespace
) -> None:
    modes = {mode: RewardModel.load(directory, dtype=dtype, mode=mode) for mode in ("exact", "fast")}
    model = modes["exact"]
    batch = pack(group_items(items, share=model.shares_prompt))
    model.trunk.thaw()  # a frozen one keeps the weights elsewhere
    products = products_of(model, batch)
    model.freeze()
    square = square_product(model)
    seconds: dict[str, list[float]] = {key: [] for key in ("exact", "fast", "products", "square")}
    with torch.inference_mode():
        for _ in range(arguments.rounds + 2):
            for mode, scorer in modes.items():
                seconds[mode].append(timed(lambda scorer=scorer: scorer.forward(batch)))
            seconds["products"].append(sum(timed(product) for product in products))
            seconds["square"].append(timed(square))
    exact, fast, floor, cube = (np.array(seconds[key][2:]) for key in seconds)
    rate = flops_of(model, batch) / exact
    rows.append(
        "roofline",
        {
            "model": name,
            "dtype": dtype,
            "load": load,
            "threads": arguments.threads,
            "tokens": batch.tokens,
            "gflop_s": round(float(np.median(rate)) / 1e9, 1),
            **{f"of_shapes_{key}": value for key, value in rows.spread((floor / exact).tolist()).items()},
            "of_square_p50": round(float(np.median(rate / (2 * 2048**3 / cube))), 4),
            "exact_over_fast_p50": round(float(np.median(exact / fast)), 4),
            "rounds": len(exact),
        },
    )


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def products_of(model: RewardModel, batch: PackedBatch) -> list[Callable[[], object]]:
    """The products that the batch needs, each as a call: in the last layer, of all rows, keys and values only."""
    dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    calls = []
    for linear in products_over_all_rows(model):
        frozen, x_TK = (
            FrozenLinear(linear.weight, None, exact=True),
            torch.randn(batch.tokens, linear.in_features).to(dtype),
        )
        calls.append(lambda frozen=frozen, x_TK=x_TK: frozen(x_TK))
    return calls


def square_product(model: RewardModel) -> Callable[[], object]:
    dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    return lambda: nn.functional.linear(a, b)


def group() -> list[Encoded]:
    generator = np.random.default_rng(0)
    prompt = _tokens(generator, 120)
    return [Encoded(np.concatenate([prompt, _tokens(generator, 60)]), 120) for _ in range(16)]


def pairs() -> list[Encoded]:
    """Lengths like those of hh_rlhf: prompts of 20 to 300 tokens, responses of 5 to 120."""
    generator, items = np.random.default_rng(1), []
    for _ in range(12):
        prompt = _tokens(generator, int(generator.integers(20, 300)))
        items += [_joined(prompt, _tokens(generator, int(generator.integers(5, 120)))) for _ in range(2)]
    return items


def _joined(prompt: NDArray[np.int32], response: NDArray[np.int32]) -> Encoded:
    return Encoded(np.concatenate([prompt, response]), len(prompt))


def _tokens(generator: np.random.Generator, count: int) -> NDArray[np.int32]:
    return generator.integers(5, 400, count, dtype=np.int32)


LOADS = {"1 x 16, 120 + 60": group, "12 pairs": pairs}

if __name__ == "__main__":
    main()
