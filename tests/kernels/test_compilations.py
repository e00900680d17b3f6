"""Compilations are seen by Triton's own hook; tests/pretended_gpu.py compiles for an H100 that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
import triton

from plaudit_kernels import gated, watch_compilations

SCRIPT = Path(__file__).parents[1] / "pretended_gpu.py"


def test_what_is_compiled_is_named_once_with_what_it_is_for() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "compile"], capture_output=True, text=True, check=True)
    first, same, other = json.loads(done.stdout)
    assert len(first) == len(other) == 1 and not same
    assert first[0].startswith("plaudit_kernels.gated._gated_forward[8 warps](gate_up: *fp32/16, ")
    assert "rows: i32, stride: i32/16, WIDTH=64, ACTIVATION=silu" in first[0] and "WIDTH=40" in other[0]


def test_the_interpreter_compiles_nothing_and_older_hooks_go_on(device: torch.device) -> None:
    runtime = triton.knobs.runtime
    called: list[str] = []
    with runtime.scope():
        runtime.jit_post_compile_hook = lambda **event: called.append(event["repr"])
        seen = watch_compilations()
        if device.type == "cpu":
            gated(torch.zeros(3, 64), "silu")
            assert not seen
        function = type("Function", (), {"module": "m", "name": "kernel"})
        build = {"signature": {"a": "*bf16", "N": "constexpr"}, "constants": {(1,): 7}, "configs": [{}], "num_warps": 4}
        runtime.jit_post_compile_hook(key="", repr="words", fn=function, compile=build, is_manual_warmup=False)
        assert seen == ["m.kernel[4 warps](a: *bf16, N=7)"] and called == ["words"]
