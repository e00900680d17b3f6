"""The application, composed from lists: routes, middleware, and what they need."""

from __future__ import annotations

from typing import Any, NoReturn

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from . import admin, compat, openapi, probe, routes
from .errors import RequestError
from .gates import gates
from .metrics import Metrics
from .middleware import Body, Direct, Gate, Report, model_in_path
from .served import Models
from .service import Service
from .settings import ServerSettings

ROUTES = [*routes.router.routes, *compat.router.routes, *probe.router.routes, *admin.router.routes]
"""Matched in this order: what is asked most comes first."""


def build_app(settings: ServerSettings, models: Models, metrics: Metrics) -> ASGIApp:
    """The server for models whose engines somebody else starts and ends (see `lifecycle`)."""
    handlers = {HTTPException: _not_routed, Exception: _passed_on}
    application = _application(exception_handlers=handlers)
    application.state.service = Service(settings, models, metrics)
    hot = [route for router in (routes.router, compat.router) for route in router.routes]
    app: ASGIApp = Direct(application, hot)
    app = Body(app, settings.limits)
    paths = {route.path for route in application.routes if isinstance(route, Route)}
    return Report(Gate(app, [*gates(settings), model_in_path]), metrics, paths)


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


def _passed_on(_request: Request, error: Exception) -> NoReturn:
    """Without this Starlette would answer by itself before `middleware.Report` could."""
    raise error
