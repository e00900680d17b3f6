"""The committed schema is the server's. Regenerate: python -m plaudit_server.openapi docs/openapi.json"""

import json
from pathlib import Path

from plaudit_server import openapi
from plaudit_server.app import published_routes
from plaudit_server.errors import RULES

COMMITTED = Path(__file__).resolve().parents[2] / "docs" / "openapi.json"


def test_the_committed_schema_equals_the_live_one():
    assert json.loads(COMMITTED.read_text()) == openapi.document(published_routes())


def test_every_reference_leads_somewhere_and_every_code_is_listed():
    document = openapi.document(published_routes())
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    assert all(f'"{name}"' in text for name in schemas)
    for reference in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in schemas
    assert schemas["ErrorDetail"]["properties"]["code"]["enum"] == sorted(RULES)


def test_bodies_are_strict_and_scores_nullable():
    schemas = openapi.document(published_routes())["components"]["schemas"]
    strict = [name for name, value in schemas.items() if value.get("additionalProperties") is False]
    assert {"ScorePromptResponse", "ScoreItems", "RankRequest", "CompareRequest", "TokenIds"} <= set(strict)
    assert {"type": "null"} in schemas["ItemResult"]["properties"]["score"]["anyOf"]
