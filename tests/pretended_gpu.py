"""An H100 that is not there: Triton compiles for it what our code launches, and the launches do nothing.

What is real: the arguments of every launch, how Triton specialises on them, its compile hook, and with `compile` the
compilation itself. So it is seen here, without a GPU, whether a forward needs a kernel that was not warmed up; what
the forward computes is not. A process of its own, in which the interpreter is off; answers in JSON.

    python tests/pretended_gpu.py compile
    python tests/pretended_gpu.py traffic MODEL:MODE:DTYPE ...
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["PLAUDIT_KERNELS"] = "triton"

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

import plaudit_kernels.attention_backward  # noqa: F401  otherwise first imported when the interpreter seems to be on
from plaudit_kernels import gated, watch_compilations
from plaudit_model import reward_model, warm
from plaudit_model.encode import Encoded
from plaudit_model.reward_model import RewardModel

os.environ["TRITON_INTERPRET"] = "1"  # the dispatcher takes the fused kernels on a CPU only then

BUDGET = 1024
COMPILE = triton.compiler.compile


class Driver:
    """As much of a driver as a launch asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Launched:
    """A compiled kernel whose launch does nothing."""

    function, packed_metadata = 0, None

    def launch_metadata(self, *arguments: Any) -> None: ...

    def run(self, *arguments: Any) -> None: ...


def pretend(*, compile: bool) -> None:
    def build(src: Any, target: GPUTarget, options: Any, **other: Any) -> Launched:
        if compile:
            COMPILE(src, target=target, options=options, **other)
        return Launched()

    triton.compiler.compile = build
    triton.runtime.driver.set_active(Driver())


def compiled() -> list[list[str]]:
    """What was compiled by each of three calls, the first two of the same width."""
    pretend(compile=True)
    seen, calls = watch_compilations(), []
    for rows, width in ((3, 64), (500, 64), (3, 40)):
        gated(torch.zeros(rows, 2 * width), "silu")
        calls.append(list(seen))
        seen.clear()
    return calls


def traffic(name: str) -> dict[str, Any]:
    """What warm-up compiled for a model, what ragged traffic compiled after it, and the kernels of both in which a
    product and a sum may become one instruction."""
    forget()
    fused: set[str] = set()

    def note(**event: Any) -> None:
        if event["compile"]["enable_fp_fusion"]:
            fused.add(f"{event['fn'].module}.{event['fn'].name}")

    triton.knobs.runtime.jit_post_compile_hook = note
    directory, mode, dtype = name.split(":")
    model = RewardModel.load(directory, mode=mode, dtype=dtype)
    seen, told = watch_compilations(), []
    warm.warm_up(model, BUDGET, told.append)
    warmed = list(seen)
    seen.clear()
    for items in ragged(model.contract.max_length):
        model.score_encoded(items, token_budget=BUDGET)
    return {"warmed": warmed, "late": list(seen), "told": told, "fused": sorted(fused)}


def forget() -> None:
    """No kernel has been compiled yet."""
    for name, module in list(sys.modules.items()):
        if name.startswith("plaudit_kernels"):
            for kernel in vars(module).values():
                if isinstance(kernel, triton.JITFunction):
                    kernel.device_caches.clear()


def ragged(longest: int) -> list[list[Encoded]]:
    """Single items of every length that means something, and random groups with prompts of every length."""
    rng = np.random.default_rng(0)

    def item(prompt: np.ndarray, tokens: int) -> Encoded:
        return Encoded(np.concatenate([prompt, rng.integers(5, 600, tokens, dtype=np.int32)]), len(prompt))

    prompts = [rng.integers(5, 600, n, dtype=np.int32) for n in (0, 1, 15, 16, 17, 31, 63, 100, 127, 128, 129, 300)]
    singles = [[item(prompts[0], n)] for n in (1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 255, 511, longest)]
    groups = [[item(p, int(rng.integers(1, 90))) for _ in range(int(rng.integers(1, 40)))] for p in prompts]
    return [*singles, *groups, [one for group in groups for one in group]]


def main(what: str, *names: str) -> None:
    if what == "compile":
        print(json.dumps(compiled()))
        return
    reward_model.prove = lambda *_: None  # there are no scores to prove
    pretend(compile=False)
    print(json.dumps([traffic(name) for name in names]))


if __name__ == "__main__":
    main(*sys.argv[1:])
