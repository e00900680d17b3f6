from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from plaudit import cli
from plaudit._extras import install

TARGETS = {"config": "cli_config:app", "score": "cli_score:score", "rank": "cli_score:rank"}
ENTRIES = {name: EntryPoint(name, f"plaudit.{target}", cli.GROUP) for name, target in TARGETS.items()}


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`show(*args)` is (exit code, standard output, standard error) of `plaudit config show`."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str, entries: dict[str, EntryPoint] = ENTRIES) -> tuple[int, str, str]:
        code = cli.run(["config", "show", *args], entries)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_without_any_configuration_everything_is_a_default(show: Callable[..., Any]) -> None:
    assert show() == (0, "", "every option has its default (--all lists them)\n")
    code, out, _ = show("--all", "score")
    assert code == 0 and 'score.overlong = "error"  # default' in out and "score.url = null  # default" in out
    assert "rank." not in out


def test_every_value_says_where_it_comes_from(show: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("plaudit.toml").write_text('[score]\nbatch = 64\nurl = "http://file"\n[config.show]\nas_json = false\n')
    monkeypatch.setenv("PLAUDIT_SCORE_URL", "http://env")
    monkeypatch.setenv("PLAUDIT_RANK_TOP_N", "3")
    code, out, _ = show()
    assert code == 0 and out.splitlines() == [
        "config.show.as_json = false  # file",
        'rank.top_n = "3"  # environment',
        'score.url = "http://env"  # environment',
        "score.batch = 64  # file",
    ]
    found = json.loads(show("--json", "score")[1])
    assert {"verb": "score", "option": "batch", "value": 64, "source": "file"} in found and len(found) == 2


def test_a_mistake_in_the_file_is_shown_for_every_verb(show: Callable[..., Any]) -> None:
    Path("plaudit.toml").write_text("[score]\nbach = 64\n")
    code, _, err = show()
    assert code == 78 and "[score] has the unknown key 'bach'" in err


def test_an_unknown_verb_is_an_error(show: Callable[..., Any]) -> None:
    code, _, err = show("scor")
    assert code == 78 and "there is no verb 'scor'" in err


def test_secrets_are_not_shown(show: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plaudit_secret_verb.py").write_text(
        'def serve(api_key: str = "", keyboard: str = "qwerty") -> None:\n    """Serve."""\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    entries = {**ENTRIES, "serve": EntryPoint("serve", "plaudit_secret_verb:serve", cli.GROUP)}
    monkeypatch.setenv("PLAUDIT_SERVE_API_KEY", "s3cret")
    out = show("serve", "--all", entries=entries)[1]
    assert out.splitlines() == ['serve.api_key = "***"  # environment', 'serve.keyboard = "qwerty"  # default']


def test_a_verb_whose_extra_is_missing_is_left_out_unless_it_is_asked_for(
    show: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plaudit_lacking_verb.py").write_text('import no_such_library\ndef train() -> None:\n    """T."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.EXTRAS, "plaudit_lacking_verb", "train")
    entries = {**ENTRIES, "train": EntryPoint("train", "plaudit_lacking_verb:train", cli.GROUP)}
    assert show(entries=entries)[0] == 0
    code, _, err = show("train", entries=entries)
    assert code == 78 and install("train") in err
