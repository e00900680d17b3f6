"""Triton's cache filled before the card is measured: what the sections of `gpu.py` launch, compiled side by side.

A kernel takes a second or two of CPU to compile and its launcher half of one, one after another, when a section first
launches it: of minutes on a card, most of them. Here the sections are walked over tensors that have shapes and no
numbers, as if there was a card, and each new kernel is compiled in a process of its own. No GPU is used: it can be
done on another machine with the same Triton and Python, whose cache is then brought along.

    TRITON_CACHE_DIR=CACHE python benchmarks/gpu_compile.py --sections all gluon --processes 16
    python benchmarks/gpu_compile.py --sections forward --list   # which kernels, by case; compiles nothing
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import gpu_models
import numpy as np
import torch
import triton
from gpu_card import Bench, Case, Ceilings, Row, Skip
from regroupings import random_items, regroup
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget

from plaudit_model import reward_model

COMPILE = triton.compiler.compile
LAYERS = 2
"""Of every model: further ones launch the same."""

CALLED = (
    "cuCtxGetCurrent", "cuCtxSetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuFuncSetAttribute",
    "cuGetErrorString", "cuPointerGetAttribute",
)  # fmt: skip
"""What a launcher asks the driver for."""

THEIRS = {"padded_scores", "_padded_step"}
"""What launches no kernel of ours, and takes long."""


class Walk(Bench):
    """Every work runs once, and nothing is timed or written. What needs a number ends its case, for there is none."""

    case = ""
    verbose = False

    def run(self, case: Case, measure: Callable[[], Sequence[Row]]) -> None:
        self.case = str(case)
        if not re.search(self.wanted, self.case):
            return
        try:
            measure()
        except Skip:
            pass
        except Exception:
            if self.verbose:
                traceback.print_exc()

    def race(self, works: Mapping[str, Callable[[], object]], *, budget: float = 1.5) -> dict[str, list[float]]:
        return self.race_walls(works)

    def race_walls(self, works: Mapping[str, Callable[[], object]], rounds: int = 7) -> dict[str, list[float]]:
        return {name: [self.wall(work)] for name, work in works.items()}

    def wall(self, work: Callable[[], object]) -> float:
        work()
        return 1.0

    def peak_mib(self, work: Callable[[], object]) -> float:
        work()
        return 1.0

    def synchronize(self) -> None: ...

    @property
    def ceilings(self) -> Ceilings:
        return Ceilings({1: [1.0]}, [1.0])


class Driver:
    """As much of a driver as a launch asks for."""

    def __init__(self, chip: int) -> None:
        self._chip = chip

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._chip, 32)


class Launched:
    """A kernel whose launch does nothing."""

    function, packed_metadata = 0, None

    def launch_metadata(self, *arguments: Any) -> None: ...

    def run(self, *arguments: Any) -> None: ...


class Compiler:
    """What Triton asks for each new kernel: compiled in a forked process, at most `processes` at once."""

    def __init__(self, bench: Walk, processes: int, *, only_list: bool) -> None:
        self._bench, self._processes, self._only_list = bench, processes, only_list
        self._running: set[int] = set()
        self.kernels, self.failed = 0, 0

    def __call__(self, src: Any, target: GPUTarget, options: Any, **_: Any) -> Launched:
        self.kernels += 1
        constants = " ".join(f"{src.fn.arg_names[key[0]]}={value}" for key, value in src.constants.items())
        told = f"{src.fn.__module__}.{src.fn.__name__} {constants}"
        if self._only_list:
            print(f"{self._bench.case}: {told}")
            return Launched()
        while len(self._running) >= self._processes:
            self._wait()
        if not (process := os.fork()):
            os._exit(_compiled(src, target, options, told))
        self._running.add(process)
        return Launched()

    def finish(self) -> None:
        while self._running:
            self._wait()

    def _wait(self) -> None:
        process, status = os.wait()
        self._running.discard(process)
        self.failed += status != 0


def _compiled(src: Any, target: GPUTarget, options: Any, told: str) -> int:
    """The exit code of the process. Nothing may be raised: the case would go on, twice."""
    from triton.backends.nvidia.driver import CudaLauncher

    try:
        kernel = COMPILE(src, target=target, options=options)
        with contextlib.suppress(ImportError):  # without a driver it is built and cannot be loaded
            CudaLauncher(src, kernel.metadata)
    except Exception as error:
        print(f"FAILED: {told}: {str(error).partition(chr(10))[0]}", flush=True)
        return 1
    return 0


def link_with_nothing(folder: str) -> None:
    """Launchers are linked with a library of the driver's name, and meet the driver's own where they are loaded."""
    source, library = Path(folder) / "stub.c", Path(folder) / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in CALLED), encoding="utf-8")
    subprocess.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)], check=True)
    triton.knobs.nvidia.libcuda_path = folder


def pretend(compiler: Compiler, chip: int) -> None:
    """There is a card of this chip from now on; its tensors have addresses, and where numbers are asked for, ones."""
    triton.compiler.compile = compiler
    triton.runtime.driver.set_active(Driver(chip))
    about = {"multi_processor_count": 132, "name": "a card", "total_memory": 1 << 37, "major": chip // 10}
    for name, value in {
        "get_device_capability": divmod(chip, 10), "get_device_properties": SimpleNamespace(**about, minor=chip % 10),
        "get_device_name": "a card", "synchronize": None, "empty_cache": None,
        "memory_allocated": 0, "is_current_stream_capturing": False, "is_bf16_supported": True,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, lambda *_, value=value: value)
    for name, answer in {
        "data_ptr": lambda tensor: (1 << 32) + tensor.storage_offset() * tensor.element_size(),
        "numpy": lambda tensor: np.ones(tuple(tensor.shape)),
        "item": lambda tensor: 1, "__int__": lambda tensor: 1, "__float__": lambda tensor: 1.0,
        "__bool__": lambda tensor: True,
    }.items():  # fmt: skip
        setattr(FakeTensor, name, answer)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.autograd.grad = torch.autograd.backward = differentiate
    torch.nn.Module._apply = applied
    generator = torch.Generator
    torch.Generator = lambda *_: generator()
    reward_model.CudaRecorder = lambda _: recorded
    reward_model.Readback = lambda scores: SimpleNamespace(wait=lambda: np.ones(tuple(scores.shape)))


def recorded(compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """As `CudaRecorder` gives it."""
    result = compute()
    return lambda: result


def few(load: Any, items: Any, alone: Any, count: int, generator: Any) -> tuple[int, int]:
    """As many regroupings as meet every kernel."""
    return regroup(load, items, alone, 50, generator)


def applied(module: torch.nn.Module, function: Callable[[torch.Tensor], torch.Tensor], *_: object) -> torch.nn.Module:
    """`Module.to` and its like: torch swaps the insides of tensors, which those without numbers do not let it."""
    for child in module.modules():
        for name, tensor in child._parameters.items():
            if tensor is not None:
                child._parameters[name] = torch.nn.Parameter(function(tensor.detach()), tensor.requires_grad)
        for name, buffer in child._buffers.items():
            child._buffers[name] = None if buffer is None else function(buffer)
    return module


def differentiate(
    outputs: torch.Tensor | Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor] = (),
    ways: Sequence[torch.Tensor] | None = None,
    **_: object,
) -> list[torch.Tensor]:
    """The backward pass without autograd's engine, which asks for a device: every node once, after all that come after
    it in the graph. The gradients are not kept; where some are asked for, others of the right shapes are given."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    ways = [torch.ones_like(output) for output in outputs] if ways is None else ways
    given: dict[Any, dict[int, torch.Tensor]] = {}
    for output, way in zip(outputs, ways, strict=True):
        if output.grad_fn is not None:
            given.setdefault(output.grad_fn, {})[output.output_nr] = way
    for node in _ordered(list(given)):
        if (numbered := given.pop(node, None)) is None or type(node).__name__ == "AccumulateGrad":
            continue
        gradients = [
            numbered.get(number, torch.empty(about.shape, dtype=about.dtype, device=about.device))
            for number, about in enumerate(node._input_metadata)
        ]
        found = getattr(node, "apply", node)(*gradients)
        several = found if isinstance(found, tuple) else (found,)
        for (after, number), gradient in zip(node.next_functions, several, strict=False):
            if after is not None and gradient is not None:
                given.setdefault(after, {})[number] = gradient
    return [torch.empty_like(leaf) for leaf in leaves]


def _ordered(roots: list[Any]) -> list[Any]:
    """The nodes of a graph, each before those that it leads to."""
    seen, order, stack = set(), [], [(root, False) for root in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(after, False) for after, _ in node.next_functions if after is not None]
    return order[::-1]


def main() -> int:
    arguments = parsed()
    if torch.version.cuda is None:
        print("this torch was built without CUDA: it knows no tensors of a card", file=sys.stderr)
        return 1
    bench = Walk(torch.device("cuda"), False, Path(tempfile.mkdtemp()), "none")
    bench.verbose, bench.wanted = arguments.verbose, arguments.only
    compiler = Compiler(bench, arguments.processes, only_list=arguments.list)
    if not Path("/dev/nvidiactl").exists():
        link_with_nothing(str(bench.results))
    pretend(compiler, arguments.chip)
    for _, sizes in gpu_models.SHAPES.values():
        sizes["num_hidden_layers"] = min(LAYERS, sizes["num_hidden_layers"])
    start = time.monotonic()
    for name in gpu.chosen(arguments.sections):
        before, began = compiler.kernels, time.monotonic()
        with FakeTensorMode(allow_non_fake_inputs=True):
            section = importlib.import_module(gpu.SECTIONS[name])
            for theirs in THEIRS & vars(section).keys():
                setattr(section, theirs, lambda *_: torch.ones(1))
            if hasattr(section, "regroup"):
                section.regroup = few
                section.random_items = lambda *given, **sizes: random_items(*given, **sizes)[:24]
            getattr(section, name)(bench)
        print(f"== {name}: {compiler.kernels - before} kernels, {time.monotonic() - began:.0f} s", flush=True)
    compiler.finish()
    print(f"{compiler.kernels} kernels in {time.monotonic() - start:.0f} s, {compiler.failed} failed")
    return 1 if compiler.failed else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=["all"], choices=["all", *gpu.SECTIONS], metavar="NAME")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--chip", type=int, default=90, help="compute capability, 90 for H100 and H200")
    parser.add_argument("--only", default="", metavar="REGEX", help="the cases to walk")
    parser.add_argument("--list", action="store_true", help="say which kernels, and compile none")
    parser.add_argument("--verbose", action="store_true", help="say where a case ended that needed a number")
    return parser.parse_args()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
