"""The line that an error names for an extra: one that works for this installation."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

from plaudit import _extras

TREE = '{"url": "file:///home/me/my%20clone", "dir_info": {"editable": true}}'


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        (None, "pip install 'plaudit[server,onnx]'"),
        (TREE, "pip install -e '/home/me/my clone[server,onnx]'"),
        (TREE.replace('"editable": true', ""), "pip install '/home/me/my clone[server,onnx]'"),
        ('{"url": "https://x/plaudit.whl", "archive_info": {}}', "pip install 'plaudit[server,onnx]'"),
    ],
)
def test_an_extra_comes_from_where_the_package_came(
    origin: str | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return origin

    monkeypatch.setattr(_extras, "distribution", lambda name: Installed())
    assert _extras.install("server,onnx") == line


def test_a_tree_that_was_never_installed_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_extras, "distribution", absent)
    assert _extras.install("model") == "pip install 'plaudit[model]'"
