"""The processes of a run, through accelerate: which one this is, its device, and what they tell each other.

Every process holds the whole policy and takes a share of the samples; gradients are *summed*, of a loss that is
normalised over all processes, so that several compute what one would. `accelerate launch` or `torchrun` starts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from plaudit_model.interrupt import StopRequest

from .errors import PeerFailed

T = TypeVar("T")


class World:
    """This process among all. `device` is the name in the configuration; `auto` takes accelerate's choice."""

    def __init__(self, device: str) -> None:
        state = PartialState(cpu=device == "cpu")
        self.rank, self.size = int(state.process_index), int(state.num_processes)
        self.device = str(state.device) if device == "auto" or self.size > 1 else device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: consecutive, and of equal size where the number divides."""
        size = -(-len(items) // self.size)
        return items[self.rank * size : (self.rank + 1) * size]

    def gather(self, items: list[T]) -> list[T]:
        """Everybody's items, in the order of the processes."""
        return list(gather_object(items)) if self.size > 1 else items

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process."""
        return any(self.gather([flag]))

    def together(self, work: Callable[[], list[T]], stop: StopRequest) -> list[T]:
        """What the processes have found, in their order; raises in all of them if one fails. A signal ends the work
        where it is: it is not kept waiting for long responses, nor for a server that may be as gone as the node that is
        being reclaimed."""
        mine: list[T] | Exception
        try:
            with stop.at_once():
                mine = work()
        except Exception as error:
            mine = error
        told = self.gather([f"{type(mine).__name__}: {mine}" if isinstance(mine, Exception) else ""])
        if isinstance(mine, Exception):
            raise mine
        if any(told):
            raise PeerFailed(f"another process stopped: {next(filter(None, told))}")
        return self.gather(mine)

    def close(self) -> None:
        """Leave the group of processes: one that exits inside it may be aborted by the threads of its connections."""
        if self.size > 1:
            PartialState().destroy_process_group()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes; one that has none counts as 0."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
