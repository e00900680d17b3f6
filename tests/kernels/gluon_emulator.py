"""Runs a Gluon kernel for sm_90 on the CPU, program by program, and finds what a card would only show as wrong numbers
or as a hang.

The kernel's Python body runs with its `gl`, `hopper`, `mbarrier` and `tma` replaced by the ones of this file. Shared
memory holds NaN until something is written there. What the copy engine brings lands either as early as it can (when
it is asked for) or as late as it can (when its barrier is waited for); both must give the same result. `Race` is
raised where

- a tile is read before it landed, or brought while a product under way reads it, or before a barrier of the whole
  program told the thread that asks for it that every warp's product is done;
- a product's operands differ between its issue and its end, or its result is used before it was waited for;
- threads' own writes to shared memory are read by the matrix unit without a fence and then a barrier between them;
- a barrier is used before its initialisation is known to all, or counts a phase twice.

`Deadlock` is raised where a barrier is waited for whose phase nothing can complete. Not modelled: layouts, swizzles,
the order in which products are summed, and the instructions that the compiler makes of all this.
"""

from __future__ import annotations

import builtins
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon.language import constexpr
from triton.runtime.jit import JITFunction


class Race(Exception):
    pass


class Deadlock(Exception):
    pass


# -- memory --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pointer:
    """Addresses of elements of a flat tensor, counted from `origin`, where a view begins."""

    memory: torch.Tensor
    offsets: Any = 0

    @classmethod
    def to(cls, tensor: torch.Tensor) -> Pointer:
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        return cls(tensor.as_strided((size,), (1,), 0), tensor.storage_offset())

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.memory, self.offsets + offsets)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.offsets[index])

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.memory.dtype)


@dataclass(frozen=True)
class Descriptor:
    """A matrix that the copy engine reads in boxes; what lies outside it is 0."""

    matrix: torch.Tensor
    box: tuple[int, int]
    layout: None = None

    @property
    def block_type(self) -> Any:
        return SimpleNamespace(nbytes=self.box[0] * self.box[1] * self.matrix.element_size(), shape=self.box)

    def read(self, row: int, column: int) -> torch.Tensor:
        found = torch.zeros(self.box, dtype=self.matrix.dtype)
        low, high = max(row, 0), min(row + self.box[0], len(self.matrix))
        if low < high:
            found[low - row : high - row] = self.matrix[low:high, column : column + self.box[1]]
        return found


@dataclass(eq=False)
class Tile:
    """A piece of shared memory. `readers` are products under way; `unseen`, whether one that ended may still be under
    way in another warp; `written`, how far a write by threads got: "" (all see it), "fenced" or "written"."""

    values: torch.Tensor
    coming: bool = False
    readers: int = 0
    unseen: bool = False
    written: str = ""

    def read(self) -> torch.Tensor:
        if self.coming:
            raise Race("a tile is read that has not landed")
        return self.values

    def overwrite(self, by: str) -> None:
        if self.coming or self.readers or self.unseen:
            reason = "is to land" if self.coming else "a product reads" if self.readers else "a slower warp may read"
            raise Race(f"{by} where a tile lies that {reason}")


@dataclass(frozen=True)
class View:
    """A tile as an operand."""

    tile: Tile
    transposed: bool = False

    def permute(self, order: tuple[int, int]) -> View:
        assert order == (1, 0)
        return View(self.tile, not self.transposed)

    def read(self) -> torch.Tensor:
        if self.tile.written:
            raise Race("the matrix unit reads what threads wrote, without a fence and a barrier")
        return self.tile.read().T if self.transposed else self.tile.read()

    def load(self, layout: object) -> torch.Tensor:
        return self.tile.read().clone()

    def store(self, values: torch.Tensor) -> None:
        self.tile.overwrite("threads write")
        self.tile.values, self.tile.written = values.to(self.tile.values.dtype), "written"


@dataclass
class Phases:
    """An mbarrier that one arrival and the bytes that it names complete."""

    known: bool = False
    counts: int = 0
    done: int = 0
    arrived: bool = False
    bytes: int = 0
    coming: list[Callable[[], None]] = field(default_factory=list)

    def settle(self) -> None:
        if self.arrived and self.bytes == 0:
            self.done, self.arrived = self.done + 1, False


@dataclass
class Ring:
    items: list[Any]

    def index(self, number: Any) -> Any:
        item = self.items[int(number)]
        return View(item) if isinstance(item, Tile) else item


@dataclass(eq=False)
class Product:
    """A product under way: a group of the matrix unit."""

    left: torch.Tensor
    right: View
    before: torch.Tensor | None
    issued: torch.Tensor = field(init=False)
    result: torch.Tensor | None = None

    def __post_init__(self) -> None:
        self.issued = self.right.read().clone()
        self.right.tile.readers += 1

    def end(self) -> None:
        tile = self.right.tile
        tile.readers, tile.unseen = tile.readers - 1, True
        if not torch.equal(self.right.read().nan_to_num(7.0), self.issued.nan_to_num(7.0)):
            raise Race("an operand changed under a product")
        # In fp64, rounded once: no row's bits depend on where in a tile it lies.
        mixed = self.left.double() @ self.issued.double()
        self.result = (mixed if self.before is None else mixed + self.before.double()).float()


# -- the language --------------------------------------------------------------------------------------------


class Machine:
    """One program on the device: its shared memory, its barriers, its products under way."""

    def __init__(self, program: tuple[int, int], early: bool) -> None:
        self.program, self.early = program, early
        self.tiles: list[Tile] = []
        self.barriers: list[Phases] = []
        self.under_way: list[Product] = []
        self.gl = SimpleNamespace(
            int64=torch.int64, float32=torch.float32, program_id=lambda axis: torch.tensor(program[axis]),
            load=load, store=store, where=where, arange=lambda low, high, layout: torch.arange(low, high),
            maximum=torch.maximum, max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
            exp2=torch.exp2, log2=torch.log2, fma=fma, convert_layout=lambda x, layout: x, static_range=range,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            allocate_shared_memory=self.allocate,
            **dict.fromkeys(LAYOUTS, lambda *_: None),
        )  # fmt: skip
        self.mbarrier = SimpleNamespace(MBarrierLayout=lambda: None, init=init, expect=expect, wait=self.wait)
        self.tma = SimpleNamespace(async_copy_global_to_shared=self.bring)
        self.hopper = SimpleNamespace(
            fence_async_shared=self.fence, warpgroup_mma=self.product, warpgroup_mma_wait=self.ended
        )

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: object) -> Ring:
        if dtype is torch.int64:
            phases = [Phases() for _ in range(shape[0])]
            self.barriers += phases
            return Ring(phases)
        tiles = [Tile(torch.full(shape[1:], torch.nan, dtype=dtype)) for _ in range(shape[0])]
        self.tiles += tiles
        return Ring(tiles)

    def fence(self) -> None:
        for tile in self.tiles:
            tile.written = "fenced" if tile.written else ""

    def barrier(self) -> None:
        """Every warp is here: what each has done, it has done for all."""
        for tile in self.tiles:
            tile.unseen = False
            tile.written = "" if tile.written == "fenced" else tile.written
        for phases in self.barriers:
            phases.known = True

    def bring(self, source: Descriptor, at: list[Any], phases: Phases, target: View, pred: Any) -> None:
        if not pred:
            return
        tile, values = target.tile, source.read(*map(int, at))
        tile.overwrite("the copy engine writes")
        tile.coming = True

        def land() -> None:
            tile.values, tile.coming = values, False
            phases.bytes -= source.block_type.nbytes
            phases.settle()

        if self.early:
            land()
        else:
            phases.coming.append(land)

    def wait(self, phases: Phases, parity: Any, pred: Any = True) -> None:
        if not pred:
            return
        if not phases.known:
            raise Race("a barrier is waited for that may not be initialised")
        if phases.done % 2 == int(parity):
            for land in phases.coming:
                land()
            phases.coming.clear()
        if phases.done % 2 == int(parity):
            raise Deadlock(f"phase {phases.done} of a barrier never ends")

    def product(
        self, left: torch.Tensor, right: View, sums: torch.Tensor, use_acc: bool = True, is_async: bool = False
    ) -> Any:
        product = Product(left, right, sums if use_acc else None)
        self.under_way.append(product)
        return product if is_async else self.ended(0, [product])

    def ended(self, pending: int, deps: list[Any]) -> Any:
        """Products end in the order of their issue, all but the last `pending`."""
        while len(self.under_way) > pending:
            self.under_way.pop(0).end()
        values = [dep.result if isinstance(dep, Product) else dep for dep in deps]
        if any(value is None for value in values):
            raise Race("the result of a product is used that is under way")
        return values[0] if len(values) == 1 else tuple(values)

    def finish(self) -> None:
        if self.under_way or any(tile.coming for tile in self.tiles):
            raise Race("a program ends with copies or products under way")


LAYOUTS = ("NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "SliceLayout")


def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> torch.Tensor:
    offsets = torch.as_tensor(pointer.offsets)
    taken = torch.ones_like(offsets, dtype=torch.bool) if mask is None else mask.expand(offsets.shape)
    found = pointer.memory[torch.where(taken, offsets, 0)]  # what lies outside the memory is an IndexError
    return torch.where(taken, found, torch.tensor(other).to(found.dtype))


def store(pointer: Pointer, values: torch.Tensor, mask: torch.Tensor) -> None:
    taken = mask.expand(pointer.offsets.shape)
    if not pointer.memory[pointer.offsets[taken]].isnan().all():
        raise Race("an element of the output is written twice")
    pointer.memory[pointer.offsets[taken]] = values[taken].to(pointer.memory.dtype)


def where(condition: Any, yes: Any, no: Any) -> torch.Tensor:
    values = yes if isinstance(yes, torch.Tensor) else no
    dtype = values.dtype if isinstance(values, torch.Tensor) else None
    return torch.where(torch.as_tensor(condition), *(torch.as_tensor(x, dtype=dtype) for x in (yes, no)))


def fma(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return (x.double() * y.double() + z.double()).float()


def init(phases: Phases, count: int) -> None:
    assert count == 1


def expect(phases: Phases, count: int, pred: Any) -> None:
    if pred:
        if not phases.known or phases.arrived:
            raise Race("a barrier counts a phase that has not ended, or may not be initialised")
        phases.arrived, phases.bytes = True, phases.bytes + count


# -- programs ------------------------------------------------------------------------------------------------


def bound(function: Any, machine: Machine) -> Callable[..., Any]:
    """The kernel's function with the names of its module bound to the machine, and what it calls likewise."""
    raw = function.fn
    names: dict[str, Any] = {"__builtins__": builtins}
    for key in raw.__code__.co_names:
        known = raw.__globals__.get(key)
        if isinstance(known, JITFunction):
            names[key] = bound(known, machine)
        elif isinstance(known, constexpr):
            names[key] = known.value
        elif key in raw.__globals__:
            names[key] = getattr(machine, key)
    return types.FunctionType(raw.__code__, names, raw.__name__, raw.__defaults__)


def run(function: Any, grid: tuple[int, int], early: bool, *arguments: Any, **constants: Any) -> None:
    """Every program of the grid, one after another. Tensors become pointers, those without a dimension are numbers."""
    given = [Pointer.to(a) if isinstance(a, torch.Tensor) and a.dim() else a for a in arguments]
    for program in programs(grid):
        machine = Machine(program, early)
        bound(function, machine)(*given, **constants)
        machine.finish()


def programs(grid: tuple[int, int]) -> Iterator[tuple[int, int]]:
    return ((x, y) for y in range(grid[1]) for x in range(grid[0]))
