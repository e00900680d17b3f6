"""What a kernel costs on an H100 or H200 (sm_90), or another chip, found without one: registers, spills, shared memory.

Triton compiles for a GPU that is not there; its bundled ptxas says what the result needs. That happens in a process
of its own (this file run as a script), where Triton's interpreter is off.

    [cost] = costs([Kernel("plaudit_kernels.norm_triton", "_forward", {"x": "*bf16", "rows": "i32"}, {"WIDTH": 64})])
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from typing import Any

SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one block may use, by chip."""


@dataclass(frozen=True)
class Kernel:
    """One specialisation of a `@triton.jit` function: the type of every run-time argument (`*bf16`, `i32`, `fp32`),
    the value of every constexpr. Pointers are taken to be aligned to 16 bytes; so are integers to 16, unless the
    function does not specialise them: what a launch on ordinary tensors finds. `fusion`: whether a product and a sum
    may become one instruction."""

    module: str
    function: str
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    chip: int = 90
    fusion: bool = True
    read: bool = True
    """Whether the instructions of the chip are looked at, which takes as long again as compiling."""


@dataclass(frozen=True)
class Cost:
    chip: int
    registers: int
    spills: int
    shared: int
    wgmma: int
    async_copies: int
    fusible: int
    """Products and sums that ptxas may fuse, here and not there."""
    fused: int | None
    """Those that it did fuse, in fp32. This and the next are None where the code was not read."""
    roots: int | None
    """Reciprocal square roots of the code: a norm has as many as there are copies of what it does to a row."""
    serialised: bool
    """Whether ptxas waits for every product of the matrix unit at once."""
    hidden_exponentials: int
    """How many of the code are computed while a product of the matrix unit is under way."""

    def fits(self, spills: int = 0) -> bool:
        return self.spills <= spills and self.shared <= SHARED_LIMIT[self.chip]


def costs(kernels: list[Kernel]) -> list[Cost]:
    """The cost of each kernel, in order; takes 1 to 3 seconds a kernel. Raises RuntimeError if one does not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    request = json.dumps([dataclasses.asdict(kernel) for kernel in kernels])
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache  # a cached result would come without ptxas's words
        done = subprocess.run(
            [sys.executable, __file__], input=request, env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{len(kernels)} kernels for sm_90: {done.stderr[-4000:]}")
    return [Cost(**cost) for cost in json.loads(done.stdout)]


def _cost(kernel: Kernel) -> Cost:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    function = getattr(importlib.import_module(kernel.module), kernel.function)
    source = GluonASTSource if function.is_gluon() else ASTSource
    given = kernel.signature.keys() | kernel.constexprs.keys()
    assert given == set(function.arg_names), f"{kernel.function}: {given ^ set(function.arg_names)} differ"
    signature = {name: kernel.signature.get(name, "constexpr") for name in function.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, parameter in enumerate(function.params)
        if signature[parameter.name].startswith(("*", "i")) and not parameter.do_not_specialize
    }
    constants = {(function.arg_names.index(name),): value for name, value in kernel.constexprs.items()}
    triton.knobs.nvidia.dump_ptxas_log = True
    words = io.StringIO()
    with contextlib.redirect_stdout(words):
        compiled = triton.compile(
            source(function, signature, constants, aligned),
            target=GPUTarget("cuda", kernel.chip, 32),
            options={
                "num_warps": kernel.num_warps,
                "num_stages": kernel.num_stages,
                "enable_fp_fusion": kernel.fusion,
            },  # fmt: skip
        )
    ptx, code = compiled.asm["ptx"], _code(compiled.asm["cubin"]) if kernel.read else []
    fused = sum(" FFMA" in f" {line}" for line in code) - len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32\b", ptx))
    return Cost(
        chip=kernel.chip,
        registers=_number(r"Used (\d+) registers", words.getvalue()),
        spills=_number(r"(\d+) bytes spill stores", words.getvalue()),
        shared=compiled.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        async_copies=ptx.count("cp.async.c") + ptx.count("cp.async.bulk.tensor"),
        fusible=len(re.findall(r"\b(?:mul|add|sub)(?:\.ftz)?\.f32\b", ptx)),
        fused=fused if kernel.read else None,
        roots=sum("MUFU.RSQ" in line for line in code) if kernel.read else None,
        serialised="wgmma.mma_async instructions are serialized" in words.getvalue(),
        hidden_exponentials=_hidden(code) if function.is_gluon() else 0,
    )


def _code(cubin: bytes) -> list[str]:
    """The instructions of the chip, one after another."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*?) *;", text)


def _hidden(code: list[str]) -> int:
    """The exponentials between the last product that is issued and the next wait for one. Raises AssertionError
    where a register is written that a product under way reads as its left operand: nobody tells ptxas of it."""
    hidden, since, read = 0, 0, set[int]()
    for line in code:
        if product := re.search(r"HGMMA\S+ R\d+, (?:R(\d+), )?", line):
            since, read = 0, read | ({int(product[1]) + i for i in range(4)} if product[1] else set())
        elif "WARPGROUP.DEPBAR" in line:
            hidden, since, read = hidden + since, 0, set()
        elif read:
            since += "MUFU.EX2" in line
            target = re.match(r"(?:@!?U?P\w+ )?[A-Z0-9]+(?:\.\w+)* R(\d+),", line)
            assert not target or int(target[1]) not in read, line
    return hidden


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"ptxas did not say {pattern!r}: {text}"
    return int(found.group(1))


if __name__ == "__main__":
    answers = [dataclasses.asdict(_cost(Kernel(**request))) for request in json.load(sys.stdin)]
    print(json.dumps(answers))
