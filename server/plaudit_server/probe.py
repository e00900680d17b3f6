"""What the server says of itself: probes, identity, limits, metrics and the playground page."""

from __future__ import annotations

import dataclasses
import time
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response

from . import metrics
from .compat import OVERLONG
from .served import Served
from .service import json_response, named_model, service_of
from .settings import MAX_ITEMS, ServerSettings

router = APIRouter()

_STARTED = int(time.time())
_PAGE_POLICY = "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'"


@router.head("/livez", include_in_schema=False)
@router.get("/livez")
async def livez(request: Request) -> Response:
    """The process answers; 503 where only a restart helps."""
    broken = any(model.engine.broken for model in service_of(request).models)
    return json_response({"status": "broken" if broken else "alive"}, 503 if broken else 200)


@router.head("/health", include_in_schema=False)
@router.get("/health")
@router.head("/readyz", include_in_schema=False)
@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 once every model, or the one that the URL names, has given a real score and has a worker; else 503."""
    named, states = named_model(request), service_of(request).models.states
    if named is not None:
        states = {named.id: states[named.id]}
    waiting = [state for state in states.values() if state != "ready"]
    body = {"status": waiting[0] if waiting else "ready", "models": states}
    return json_response(body, 503 if waiting else 200, [("retry-after", "1")] if waiting else ())


@router.get("/info")
async def info(request: Request) -> Response:
    """Who scores, how, and what a request may be. At the top level: the model that the URL names, or the first."""
    service = service_of(request)
    named = named_model(request)
    models = [_described(model) for model in service.models]
    first = _described(named) if named else models[0]
    return json_response({"name": "plaudit", **first, **_house(service.settings), "models": models})


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The served models, or the one that the URL names, as OpenAI lists them."""
    named = named_model(request)
    data = [
        {"id": model.id, "object": "model", "created": _STARTED, "owned_by": "plaudit"}
        for model in ([named] if named else service_of(request).models)
    ]
    return json_response({"object": "list", "data": data})


@router.get("/metrics")
async def prometheus(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(service_of(request).metrics.exposition(), media_type=metrics.CONTENT_TYPE)


@router.get("/", include_in_schema=False)
async def playground() -> Response:
    """The page on which people try the model."""
    page = files(__package__).joinpath("playground.html").read_bytes()
    headers = {"content-security-policy": _PAGE_POLICY, "x-content-type-options": "nosniff"}
    return Response(page, headers=headers, media_type="text/html; charset=utf-8")


def _described(model: Served) -> dict[str, Any]:
    contract, loaded = model.contract, model.loaded
    return {
        "model": model.id,
        "state": model.engine.state,
        "workers": [{"device": lane.device, "state": lane.phase} for lane in model.engine.lanes],
        "queued_tokens": model.engine.queued_tokens,
        **dataclasses.asdict(loaded),
        "contract": {
            "label": contract.label,
            "head": contract.head.kind,
            "pooling": contract.pooling,
            "template": {"kind": contract.template.kind, "sha256": contract.template.sha256},
            "statistics": dataclasses.asdict(contract.statistics) if contract.statistics else None,
            "temperature": contract.calibration.temperature if contract.calibration else None,
        },
    }


def _house(settings: ServerSettings) -> dict[str, Any]:
    limits = settings.limits
    return {
        "limits": {
            "max_items": MAX_ITEMS, "max_body_bytes": limits.body_bytes, "max_item_bytes": limits.item_bytes,
            "max_header_bytes": limits.header_bytes, "max_headers": limits.headers,
            "default_deadline_ms": settings.deadline_seconds * 1000,
        },
        "rendered_text": settings.rendered_text,
        "overlong": {"native": "error", **{path: settings.overlong or own for path, own in OVERLONG.items()}},
    }  # fmt: skip
