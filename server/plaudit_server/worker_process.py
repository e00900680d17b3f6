"""The worker: one process that owns one model and scores what it is sent.

It may die at any moment, and nothing is lost but time: it holds no state beyond the model. It dies by itself
when the front is gone: the link ends, or, in the middle of a forward, the kernel kills it with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from plaudit_kernels import watch_compilations
from plaudit_model import warm
from plaudit_model.errors import ModelError
from plaudit_model.footprint import Room
from plaudit_model.memory import keep_freed_memory
from plaudit_model.packing import Group, group_items, pack, split_by_budget
from plaudit_model.readback import Landing, readback_of
from plaudit_model.reward_model import RewardModel, choose_device

from . import faults, messages
from .domain import ModelInfo
from .faults import Fault
from .link import SocketLink
from .messages import Failure, LoadOrder, Scores

logger = logging.getLogger("plaudit.worker")

_PR_SET_PDEATHSIG = 1

Part = tuple[messages.Attributes, NDArray[np.bool_]]
"""Attributes (N, A), and (N,) which of the sequences do not fit into memory alone."""


def run(end: socket.socket) -> int:
    """The whole life of a worker on its end of the link. Returns the exit status."""
    faulthandler.enable()
    try:
        return _serve(end)
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the front went away first
    except Exception:
        logger.exception("the worker failed")
        return 70


def _serve(end: socket.socket) -> int:
    link = SocketLink(end)
    link.send(messages.born_frame(os.getpid()))
    frame = link.receive()
    if frame is None:
        return 0
    keep_freed_memory()
    try:
        note = lambda line: link.send(messages.note_frame(line))  # noqa: E731
        scorer = Scorer(messages.load_order(frame), faults.read(os.environ), note)
    except ModelError as error:
        link.send(messages.refused_frame(str(error)))
        return 78
    except Exception as error:
        logger.exception("the model could not be loaded")
        link.send(messages.refused_frame(_one_line(error)))
        return 78
    gc.collect()
    gc.freeze()  # what the model consists of lives as long as the process: collections need not walk it
    link.send(messages.ready_frame(scorer.info))
    answer_batches(link, scorer)
    return 0


def answer_batches(link: SocketLink, scorer: Scorer) -> None:
    """Until the front is gone. A batch that comes while the device computes another is launched behind it, before
    that one is read."""
    running: deque[Running] = deque()
    while True:
        if running and (len(running) > 1 or not link.arrives_before(running[0].landed)):
            answer = scorer.finish(running.popleft())
            link.send(messages.scores_frame(answer) if isinstance(answer, Scores) else messages.failed_frame(answer))
        elif (frame := link.receive()) is not None:
            running.append(scorer.begin(messages.batch_groups(frame)))
        else:
            return


@dataclass(frozen=True)
class Running:
    """A batch that was begun at `started`, a moment of `time.monotonic()`. `readback`: its scores, if it is launched;
    without one it is computed when it is finished."""

    groups: list[Group]
    started: float
    readback: Landing | None

    def landed(self) -> bool:
        return self.readback is None or self.readback.landed()


class Scorer:
    """A loaded model that has given a real score."""

    def __init__(
        self, order: LoadOrder, armed: tuple[Fault, ...] = (), note: Callable[[str], None] = logger.info
    ) -> None:
        if order.cpus:
            os.sched_setaffinity(0, order.cpus)
        shared = max(torch.get_num_threads() // order.workers, 1) if order.workers > 1 else None
        if threads := order.threads or len(order.cpus) or shared:
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")  # TORCH_ALLOW_TF32_CUBLAS_OVERRIDE of some containers lowers it
        self._faults, self._compiled = armed, watch_compilations()
        self._token_cap: int | None = None
        self._finished = 0.0
        room = Room(order.token_budget, order.memory_cap)
        room.enforce(choose_device(order.device))
        self._model = model = RewardModel.load(
            order.model, device=order.device, dtype=order.dtype, mode=order.mode, room=room
        )
        note(
            f"{model.parameters / 1e6:,.1f} M parameters loaded and proven in {sum(model.laps.seconds.values()):.1f} s"
        )
        self._read_back = readback_of(model.device)
        if warm.pays(model):
            self._token_cap = warm.warm_up(model, order.token_budget, note)
            model.record(self._token_cap or order.token_budget, note)
        self._self_test()
        model.laps.lap("warm_up")
        if self._compiled:
            note(f"{len(self._compiled)} kernels compiled or read from Triton's cache")
            self._compiled.clear()
        self.info = _info(model, room)

    def begin(self, groups: list[Group]) -> Running:
        """Launch a batch behind what the device computes. One that does not fit into memory is left for `finish`."""
        started, readback = time.monotonic(), None
        if self._read_back and sum(group.tokens for group in groups) <= (self._token_cap or sys.maxsize):
            with contextlib.suppress(torch.OutOfMemoryError):
                readback = self._read_back(self._forward(groups))
        return Running(groups, started, readback)

    def finish(self, running: Running) -> Scores | Failure:
        """Attributes of every sequence of the groups, in their order; in parts, if memory does not hold them together.
        What the forward raises is a Failure, unless it leaves the device unusable: then the process ends with it."""
        try:
            attributes, unfit = self._finish(running)
        except Exception as error:
            if self._model.device.startswith("cuda"):
                raise  # an error inside a kernel poisons the context for everything after it
            logger.exception("the forward raised")
            return Failure(_one_line(error))
        late = tuple(self._compiled)
        self._compiled.clear()
        rows = tuple(np.flatnonzero(unfit).tolist())
        begun, self._finished = max(running.started, self._finished), time.monotonic()
        return Scores(attributes, self._finished - begun, late, rows, self._token_cap)

    def score(self, groups: list[Group]) -> Scores | Failure:
        """One batch alone, as `finish` gives it."""
        return self.finish(self.begin(groups))

    def _finish(self, running: Running) -> Part:
        groups = running.groups
        if running.readback is not None:
            attributes = self._after(groups, running.readback.wait())
            return attributes, np.zeros(len(attributes), np.bool_)
        budget = self._token_cap or sum(group.tokens for group in groups)
        return _joined(map(self._fitted, split_by_budget(groups, budget)))

    def _fitted(self, groups: list[Group]) -> Part:
        """Attributes (N, A), and which of the sequences do not fit into memory alone. What runs out of memory is run
        again in halves: half of it is then the most that a batch holds, for as long as this process lives."""
        try:
            attributes = self._after(groups, self._forward(groups).cpu().numpy())
            return attributes, np.zeros(len(attributes), np.bool_)
        except torch.OutOfMemoryError:
            pass  # tried again below: here the traceback still holds the tensors
        torch.cuda.empty_cache()
        half = max(sum(group.tokens for group in groups) // 2, 1)
        parts = split_by_budget(groups, half)
        if len(parts) == 1:
            nothing = np.full((1, len(self._model.contract.head.attributes)), np.nan, np.float32)
            return nothing, np.ones(1, np.bool_)
        self._token_cap = min(half, self._token_cap or half)
        return _joined(map(self._fitted, parts))

    @torch.inference_mode()
    def _forward(self, groups: list[Group]) -> torch.Tensor:
        for fault in self._faults:
            fault.before(groups)
        return self._model.forward(pack(groups))

    def _after(self, groups: list[Group], attributes: messages.Attributes) -> messages.Attributes:
        for fault in self._faults:
            attributes = fault.after(groups, attributes)
        return attributes

    def _self_test(self) -> None:
        """Score two real responses to one prompt, as a request would. Raises ModelError if that fails."""
        encoder = self._model.encoder
        items = [encoder.encode("Name a prime number.", text, "truncate_left") for text in ("Seven.", "It is 8.")]
        answer = self.score(group_items(items, share=self._model.shares_prompt))
        if isinstance(answer, Failure) or answer.unfit:
            reason = answer.reason if isinstance(answer, Failure) else "out of memory"
            raise ModelError(f"the model does not score: {reason}")


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when `parent` is gone, and check that it is not gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def ignore_terminal() -> None:
    """Ctrl-C, the service manager's SIGTERM and the SIGHUP of a terminal that is closed go to the whole process group,
    and it is the front that decides when a worker has done its work."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def main(arguments: list[str]) -> int:
    """`python -P -m plaudit_server.worker_process FD`: a worker on an inherited socket."""
    ignore_terminal()
    with socket.socket(fileno=int(arguments[0])) as end:
        end.set_inheritable(False)
        return run(end)


def _info(model: RewardModel, room: Room) -> ModelInfo:
    contract = model.contract
    return ModelInfo(
        architecture=contract.architecture, attributes=contract.head.attributes, revision=contract.revision(),
        numerics=model.numerics, dtype=model.dtype, mode=model.mode, device=model.device,
        backend=contract.serving.backend, path=model.path_reason, sharing=model.sharing,
        max_length=contract.max_length, parameters=model.parameters, shares_prompt=model.shares_prompt,
        memory_bytes=room.prediction(model.module, model.dtype) | {"cap": room.cap}, ready_s=model.laps.seconds,
    )  # fmt: skip


def _joined(parts: Iterable[Part]) -> Part:
    attributes, unfit = zip(*parts, strict=True)
    return np.concatenate(attributes), np.concatenate(unfit)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
