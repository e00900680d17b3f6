"""The published schema: FastAPI's own for the routes, ours for the bodies, which are read raw.

`python -m plaudit_server.openapi docs/openapi.json` writes it down; a test holds the file against the server.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from . import schema, schema_answers
from .errors import RULES

DESCRIPTION = (
    "Scores of a reward model. Every route also lives under `/m/{model}[@revision]/...`. Errors have one shape, and "
    "one failed item among several is `score: null` with its error, not a failed request."
)

_RERANK = ("/rerank", "/v1/rerank", "/v2/rerank")
_BODIES: dict[str, Any] = {
    "/score": schema.ScoreRequest, "/rank": schema.RankRequest, "/compare": schema.CompareRequest,
    "/get_reward": schema.RewardRequest, "/v1/score/evaluation": schema.EvaluationRequest,
    "/classify": schema.ClassificationRequest, "/pooling": schema.PoolingRequest,
    "/v1/embeddings": schema.EmbeddingsRequest, **dict.fromkeys(_RERANK, schema.RerankRequest),
}  # fmt: skip
_ANSWERS: dict[str, Any] = {
    "/score": schema_answers.ScoreAnswer, "/rank": schema_answers.RankAnswer,
    "/compare": schema_answers.CompareAnswer, "/get_reward": schema_answers.RewardAnswer,
    "/v1/score/evaluation": schema_answers.EvaluationAnswer, "/classify": schema_answers.ClassificationAnswer,
    "/pooling": schema_answers.PoolingAnswer, "/v1/embeddings": schema_answers.EmbeddingsAnswer,
    **dict.fromkeys(_RERANK, schema_answers.RerankAnswer),
}  # fmt: skip
_REF = "#/components/schemas/{model}"


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an application."""
    published = get_openapi(title="plaudit", version="1", description=DESCRIPTION, routes=app.routes)
    published["components"] = {"schemas": _components(), "securitySchemes": _SECURITY}
    published["security"] = [{name: []} for name in _SECURITY]
    lines = [{"$ref": _REF.format(model=name)} for name in ("ItemResult", "Head")]
    stream = {"application/x-ndjson": {"schema": {"anyOf": lines}}}
    for path, operations in published["paths"].items():
        for operation in operations.values():
            operation["responses"]["default"] = _content("ErrorAnswer", "an error; the codes are in `error.code`")
            if path in _BODIES:
                operation["requestBody"] = {"required": True, **_content(f"Request{path.replace('/', '_')}")}
                operation["parameters"] = _PARAMETERS
                operation["responses"]["200"] = _content(_ANSWERS[path].__name__, "the answer")
    published["paths"]["/score"]["post"]["responses"]["200"]["content"] |= stream
    return published


def _components() -> dict[str, Any]:
    requests = [(f"Request{path.replace('/', '_')}", kind) for path, kind in _BODIES.items()]
    answers = [(kind.__name__, kind) for kind in (*_ANSWERS.values(), schema_answers.Head, schema_answers.ErrorAnswer)]
    mode: JsonSchemaMode = "validation"
    inputs = [(name, mode, TypeAdapter(kind)) for name, kind in requests + answers]
    schemas, shared = TypeAdapter.json_schemas(inputs, ref_template=_REF)
    components = dict(shared.get("$defs", {}))
    for (name, _), value in schemas.items():
        if value.get("$ref") != _REF.format(model=name):
            components[name] = value
    components["ErrorDetail"]["properties"]["code"]["enum"] = sorted(RULES)
    return components


def _content(name: str, description: str | None = None) -> dict[str, Any]:
    content = {"content": {"application/json": {"schema": {"$ref": _REF.format(model=name)}}}}
    return content if description is None else {"description": description, **content}


_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "basic": {"type": "http", "scheme": "basic", "description": "the key is the password"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_PARAMETERS = [
    {"name": name, "in": "query", "required": False, "schema": value}
    for name, value in TypeAdapter(schema.QueryOptions).json_schema()["properties"].items()
]


def main(arguments: list[str]) -> int:
    """Write the document of this version to a file."""
    from .app import published_routes

    text = json.dumps(document(published_routes()), indent=1, sort_keys=True)
    Path(arguments[1]).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
