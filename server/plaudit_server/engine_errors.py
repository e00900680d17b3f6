"""Everything the engine raises on purpose. The edge maps `code` to a status in one table.

EngineError
  Overloaded         at capacity: the request was not taken; carries when to come back
  Draining           shutting down: the request was not taken, or was not finished in time
  Unavailable        no worker: not started yet, or none can be kept for now
  Asleep             the device is lent out: batch work waits, other work is not taken
  TooLarge           the request can never fit
  DeadlineExceeded   the item's deadline passed before its score was there
  WorkerCrashed      the item kills the worker, alone and twice; its neighbours have their scores
  ScoringFailed      the item makes the forward raise, alone
  OutOfMemory        the item does not fit into the device's memory, alone
  NonFinite          the model gives NaN or infinity for the item
  WorkerFailed       the worker could not start: the model cannot be loaded or does not score
"""

from __future__ import annotations

from typing import ClassVar


class EngineError(Exception):
    """Base. `code` is stable: clients and tests match on it. `retryable`: the same request may succeed later."""

    code: ClassVar[str]
    retryable: ClassVar[bool]
    exit_code = 69


class Overloaded(EngineError):
    """The queue is full. `retry_after` is in seconds: about when half of it will have been worked off."""

    code, retryable = "overloaded", True

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(EngineError):
    code, retryable = "draining", True


class Unavailable(EngineError):
    code, retryable = "unavailable", True


class Asleep(EngineError):
    code, retryable = "asleep", True


class TooLarge(EngineError):
    code, retryable = "too_large", False


class DeadlineExceeded(EngineError):
    """`started`: its forward was under way, so asking again is likely to be answered from the cache."""

    code, retryable = "deadline_exceeded", True

    def __init__(self, message: str, *, started: bool) -> None:
        super().__init__(message)
        self.started = started


class WorkerCrashed(EngineError):
    code, retryable = "worker_crashed", False


class ScoringFailed(EngineError):
    code, retryable = "scoring_failed", False


class OutOfMemory(EngineError):
    code, retryable = "out_of_memory", False


class NonFinite(EngineError):
    code, retryable = "non_finite_score", False


class WorkerFailed(EngineError):
    """Raised by `Engine.start`; never the answer to an item."""

    code, retryable = "worker_failed", False
    exit_code = 78
