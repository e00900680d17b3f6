"""Everything the client raises on purpose.

PlauditError
  ConfigurationError   the client was built wrongly: no URL, an option that does not exist
  InvalidInput         an item that cannot be sent; nothing left this process
  OutputFailed         a result that could not be written down
  Refused              the server understood and says no: the same request will be refused again
    BadRequest           400, 413, 422 and other 4xx
    Unauthorized         401, 403
    NotFound             404: no such model, or not a plaudit server
  Unavailable          no usable answer though the request may be fine: trying again later may help
    ConnectionFailed     not reached, or the connection broke before the answer was complete
    TimedOut             the client's own deadline passed
    DeadlineExceeded     504: the server dropped the work because its deadline had passed
    Overloaded           429, 503: at capacity, warming up or draining; see `retry_after`
    ServerFailed         any other 5xx
  ItemFailed           one item (or more) has no score; its neighbours' scores are in `scores`
  ResponseInvalid      the answer breaks the wire contract; nothing of it was used
  RevisionChanged      the model is not the one that was pinned, or changed in the middle of one call

Only `Unavailable` and `ItemFailed` become None under `on_error="none"`; the others are never swallowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .types import Scores


class PlauditError(Exception):
    """Base of the errors of this package. `exit_code` is what the command line exits with."""

    exit_code = 1

    def __init__(
        self, message: str, *, url: str | None = None, request_id: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.url, self.request_id, self.code = url, request_id, code


class ConfigurationError(PlauditError, ValueError):
    """The client or the command line was set up in a way that cannot work."""

    exit_code = 78


class InvalidInput(PlauditError, ValueError):
    """An item, a row or a file that cannot be sent as it is."""

    exit_code = 65


class OutputFailed(PlauditError):
    """A file, or standard output, takes no more: the disk is full, or the reader is gone."""

    exit_code = 74


class Refused(PlauditError):
    """The server understood the request and refused it. `reason` is its own message, `param` the field that it
    names, `type` the kind of error (`item_error`: about the only item of the request), if it says so."""

    exit_code = 65

    def __init__(
        self, message: str, *, status: int | None = None, param: str | None = None, type: str | None = None,
        reason: str = "", **about: str | None,
    ) -> None:  # fmt: skip
        super().__init__(message, **about)
        self.status, self.param, self.type, self.reason = status, param, type, reason


class BadRequest(Refused):
    """The request as a whole is wrong: a field, a shape, a size, an option the model has no statistics for."""


class Unauthorized(Refused):
    """The API key is missing or not accepted."""

    exit_code = 78


class NotFound(Refused):
    """The model or the route does not exist there."""

    exit_code = 78


class Unavailable(PlauditError):
    """No usable answer within the retries and the deadline."""

    exit_code = 69


class ConnectionFailed(Unavailable):
    """The server was not reached, or the connection broke before the answer was complete."""


class TimedOut(Unavailable):
    """The client's own deadline (`timeout`) passed."""


class DeadlineExceeded(Unavailable):
    """The server dropped the work because the deadline sent with it had passed (504)."""


class Overloaded(Unavailable):
    """The server is at capacity, warming up or draining. `retry_after` is what it asks for, in seconds."""

    def __init__(self, message: str, *, retry_after: float | None = None, **about: str | None) -> None:
        super().__init__(message, **about)
        self.retry_after = retry_after


class ServerFailed(Unavailable):
    """The server failed in a way it did not intend (5xx)."""


class ItemFailed(PlauditError):
    """An item has no score. `index` is its position in the flattened input, `code` the server's stable code.

    `scores` holds the whole answer, so that the neighbours' scores are not lost.
    """

    exit_code = 65

    def __init__(self, message: str, *, index: int = 0, scores: Scores | None = None, **about: str | None) -> None:
        super().__init__(message, **about)
        self.index, self.scores = index, scores


class ResponseInvalid(PlauditError):
    """The answer is not what the wire contract says: its length, its order, a number that is none."""

    exit_code = 69


class RevisionChanged(PlauditError):
    """Scores of two revisions must not be mixed; these would have been."""

    exit_code = 78
