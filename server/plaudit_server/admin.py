"""The routes that change what the server does: a trainer that shares its device has it for as long as they sleep."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response

from .engine import Engine
from .engine_errors import EngineError
from .errors import RequestError, from_engine
from .service import json_response, named_model, service_of

router = APIRouter()


@router.post("/sleep")
async def sleep(request: Request) -> Response:
    """Free the memory of every model, or of the one that the URL names. Interactive work is finished first, and refused
    from then on; batch work waits, up to its deadline."""
    return await _all(request, Engine.sleep)


@router.post("/wake")
async def wake(request: Request) -> Response:
    """The opposite: 200 once each has given a real score; 503 if one cannot be started, and then it sleeps on."""
    return await _all(request, Engine.wake)


async def _all(request: Request, do: Callable[[Engine], Awaitable[None]]) -> Response:
    if (page := request.headers.get("origin")) and urlsplit(page).netloc != request.headers.get("host"):
        raise RequestError("foreign_page", "a page of another site may not switch this server; ask without a browser")
    named = named_model(request)
    models = [named] if named else list(service_of(request).models)
    try:
        await asyncio.gather(*(do(model.engine) for model in models))
    except EngineError as error:
        raise from_engine(error) from error
    return json_response({"models": {model.id: model.state for model in models}})
