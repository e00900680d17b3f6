"""The one-line help of a verb, read from its source: `plaudit --help` imports no verb's module."""

from __future__ import annotations

import ast
import importlib.util
from importlib.metadata import EntryPoint
from pathlib import Path


def summary(entry: EntryPoint) -> str:
    """First sentence of the docstring of the function, or of the help of the Typer app, that `entry` names."""
    try:
        spec = importlib.util.find_spec(entry.module)
    except ImportError:
        return ""
    if spec is None or spec.origin is None:
        return ""
    texts = (_help(node, entry.attr) for node in ast.parse(Path(spec.origin).read_bytes()).body)
    lines = (text.strip().splitlines()[0] for text in texts if text)
    return next((line.partition(". ")[0].rstrip(".") + "." for line in lines), "")


def _help(node: ast.stmt, name: str) -> str | None:
    if isinstance(node, ast.FunctionDef):
        decorators = [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list]
        return ast.get_docstring(node) if node.name == name or f"{name}.callback" in decorators else None
    match node:
        case ast.Assign(targets=[ast.Name(id=target)], value=ast.Call(keywords=options)) if target == name:
            texts = (option.value for option in options if option.arg == "help")
            return next((t.value for t in texts if isinstance(t, ast.Constant) and isinstance(t.value, str)), None)
    return None
