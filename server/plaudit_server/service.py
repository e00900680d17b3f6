"""What every route needs, and how a request chooses its model and its terms."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request, Response

from plaudit_model.encode import Overlong

from .domain import Priority
from .envelope import Options, read_query
from .metrics import Metrics
from .results import dumps
from .scoring import Terms
from .served import Models, Served
from .settings import ServerSettings


@dataclass(frozen=True)
class Service:
    """What the application is made of. It hangs at `app.state.service`."""

    settings: ServerSettings
    models: Models
    metrics: Metrics


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def request_id_of(request: Request) -> str:
    return str(request.scope["state"]["request_id"])


def body_of(request: Request) -> bytes:
    """The body, which `middleware.Body` has read."""
    body = request.scope["state"]["body"]
    assert isinstance(body, bytes)
    return body


def agree(
    request: Request, options: Options, *, overlong: Overlong = "error", priority: Priority = "interactive"
) -> tuple[Served, Terms]:
    """The model that a request means, and the terms it is scored on: `overlong` and `priority` are the route's, where
    neither body nor URL says; the deadline counts from now on. Raises RequestError."""
    service, named = service_of(request), request.scope["state"].get("model")
    if named is not None or request.scope["query_string"]:
        options = options.over(replace(read_query(request.query_params.multi_items()), model=named))
    seconds = service.settings.deadline_seconds if options.deadline_ms is None else options.deadline_ms / 1000
    chosen = options.overlong or overlong, options.priority or priority
    client = (request.scope["client"] or ("",))[0]  # the address at the socket: no header makes another client
    terms = Terms(*chosen, time.monotonic() + seconds, options.transform, options.include, client)
    return service.models.find(options.model), terms


def named_model(request: Request) -> Served | None:
    """The model that the URL names; None if it names none. Raises RequestError."""
    name = getattr(request.state, "model", None)
    return None if name is None else service_of(request).models.find(name)


def json_response(value: Any, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> Response:
    """Strict JSON."""
    return Response(dumps(value), status, dict(headers), media_type="application/json")
