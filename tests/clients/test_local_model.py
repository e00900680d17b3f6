"""A real model behind the command line's local scorer."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from plaudit import _scorers

pytest.importorskip("torch")


def test_a_real_model_answers_in_the_wires_terms(
    reward_model_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = EntryPoint("torch", "plaudit_model.local:open_scorer", _scorers.LOCAL_GROUP)
    monkeypatch.setattr(_scorers, "entry_points", lambda group: [entry])
    directory = str(reward_model_dir("qwen3"))
    several = {"prompt": "Why?", "responses": ["Because.", "No.", "long " * 900]}
    with _scorers.open_scorer(None, directory, timeout=0, overlong="error") as scorer:
        scores = scorer.score_items([{"prompt": "Why?", "response": "Because."}, several])
        alone = scorer.score_items([{"prompt": "Why?", "response": "No."}])
    assert scores[0].score == scores[1].score != scores[2].score == alone[0].score
    assert scores[3].error is not None and scores[3].error.code == "too_long"
    assert [result.response_index for result in scores] == [None, 0, 1, 2] and scores.identity == scorer.identity
