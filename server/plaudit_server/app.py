"""The application, composed from lists: routes, middleware, and what they need."""

from __future__ import annotations

from typing import Any, NoReturn

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request

from . import compat, openapi, probe, routes
from .errors import RequestError
from .gates import gates
from .metrics import Metrics
from .middleware import Body, Gate, ModelPath, Report
from .served import Models
from .service import Service
from .settings import ServerSettings

ROUTES = [*routes.router.routes, *compat.router.routes, *probe.router.routes]
"""Matched in this order: what is asked most comes first."""


def build_app(settings: ServerSettings, models: Models, metrics: Metrics) -> FastAPI:
    """The server for models whose engines somebody else starts and ends (see `lifecycle`)."""
    middleware = [
        Middleware(Report, metrics=metrics),
        Middleware(Gate, checks=gates(settings)),
        Middleware(ModelPath),
        Middleware(Body, limits=settings.limits),
    ]
    app = _application(middleware=middleware, exception_handlers={HTTPException: _not_routed})
    app.state.service = Service(settings, models, metrics)
    return app


def published_routes() -> FastAPI:
    """The routes alone, for their schema."""
    return _application()


def _application(**parts: Any) -> FastAPI:
    app = FastAPI(routes=ROUTES, docs_url=None, redoc_url=None, redirect_slashes=False, **parts)
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    return app


def _not_routed(_request: Request, error: Exception) -> NoReturn:
    """What the router refuses goes the way of every other error (see `middleware.Report`)."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = tuple((error.headers or {}).items())
        raise RequestError("method_not_allowed", "this route does not take that method", headers=allowed)
    raise RequestError("not_found", "there is no such route; /openapi.json lists them")
