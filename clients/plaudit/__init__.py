"""The plaudit client: scores of a reward model, over HTTP.

    from plaudit import Client

    with Client("http://127.0.0.1:8000") as client:
        client.wait_until_ready()
        scores = client.score_responses("What is 2+2?", ["4", "5"]).scores

`AsyncClient` is the same, awaited. Importing this needs no torch and no numpy.
"""

from ._async_client import AsyncClient
from ._client import Client
from ._ensemble import AsyncEnsemble, Combination, Ensemble
from ._retry import RetryPolicy
from ._settings import Settings
from .errors import (
    BadRequest,
    ConfigurationError,
    ConnectionFailed,
    DeadlineExceeded,
    InvalidInput,
    ItemFailed,
    NotFound,
    OutputFailed,
    Overloaded,
    PlauditError,
    Refused,
    ResponseInvalid,
    RevisionChanged,
    ServerFailed,
    TimedOut,
    Unauthorized,
    Unavailable,
)
from .types import (
    Attempt,
    Comparison,
    Identity,
    Item,
    ItemError,
    Message,
    Prompt,
    Ranking,
    ScoreResult,
    Scores,
    ServerInfo,
    Timing,
    Truncation,
    Usage,
    assistant,
    system,
    user,
)

__all__ = [
    "AsyncClient", "AsyncEnsemble", "Attempt", "BadRequest", "Client", "Combination", "Comparison",
    "ConfigurationError", "ConnectionFailed", "DeadlineExceeded", "Ensemble", "Identity", "InvalidInput", "Item",
    "ItemError", "ItemFailed", "Message", "NotFound", "OutputFailed", "Overloaded", "PlauditError", "Prompt",
    "Ranking", "Refused", "ResponseInvalid", "RetryPolicy", "RevisionChanged", "ScoreResult", "Scores",
    "ServerFailed", "ServerInfo", "Settings", "TimedOut", "Timing", "Truncation", "Unauthorized", "Unavailable",
    "Usage", "assistant", "system", "user",
]  # fmt: skip
