"""How an extra is added to this installation, for errors that name one."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote


def install(extras: str) -> str:
    """The command that adds `extras` (`server,onnx`): from the source tree, where that is what was installed (PEP 610),
    because the package index knows nothing of it."""
    try:
        origin = json.loads(distribution("plaudit").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        origin = {}
    if "dir_info" not in origin:
        return f"pip install 'plaudit[{extras}]'"
    editable = "-e " if origin["dir_info"].get("editable") else ""
    return f"pip install {editable}'{unquote(origin['url'].removeprefix('file://'))}[{extras}]'"
