"""For the server's tests: tiny real models, and one process to fork their workers from.

Tests marked `anyio` and async fixtures run on asyncio, in one event loop for the session.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from plaudit_model import contract
from plaudit_model.encode import Encoded, Encoder
from plaudit_model.reward_model import RewardModel
from plaudit_server.domain import Work
from plaudit_server.faults import VARIABLE
from plaudit_server.worker import WorkerHost

from ..standing_by import possible, taking_the_place_of_the_first
from .engines import Oracle

FAULTS = {"exit_on_token": 690, "hang_on_token": 691, "raise_on_token": 692, "nan_on_token": 693}


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_model_dir(reward_model_dir: Callable[[str], Path]) -> Path:
    """A saved decoder reward model (Qwen3's shape), with a byte-level tokenizer and a ChatML template."""
    return reward_model_dir("qwen3")


@pytest.fixture(scope="session")
def tiny_bert_dir(reward_model_dir: Callable[[str], Path]) -> Path:
    """A saved cross-encoder reward model (BERT's shape): it packs, and cannot share a prompt."""
    return reward_model_dir("bert")


@pytest.fixture(scope="session")
def faults() -> dict[str, int]:
    """Token ids that set off faults in the workers of `host`. The tiny tokenizers give no text such ids."""
    return FAULTS


@pytest.fixture(scope="session")
async def host(anyio_backend: str, started_host: Callable[..., Any]) -> AsyncIterator[WorkerHost]:
    """Forks workers in a fraction of a second, where each engine's own host would import torch first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, ",".join(f"{kind}:{token}" for kind, token in FAULTS.items()))
        host = await started_host()
        yield host
        await host.close()


@pytest.fixture(scope="session")
def started_host(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`await started_host()` is a host with the environment of this moment, which has imported already."""

    async def start() -> WorkerHost:
        host = WorkerHost()
        if possible():
            with taking_the_place_of_the_first(request.getfixturevalue("standing_by").host):
                await host._start()
        return host

    return start


@pytest.fixture(scope="session")
def expected(tiny_model_dir: Path) -> Oracle:
    """Scores by the model itself, in this process, one item at a time."""
    model = RewardModel.load(tiny_model_dir, device="cpu")

    def score(work: list[Work]) -> list[float]:
        return [float(model.score_encoded([Encoded(item.ids, item.prompt_tokens)])[0, 0]) for item in work]

    return score


FAULT_TEXT = {"nan": "\x02", "exit": "\x03", "raise": "\x04", "hang": "\x05"}


@pytest.fixture(scope="session")
def fault_text() -> dict[str, str]:
    """Characters that set off a fault in the worker of a server that was started with `fault_variable`."""
    return FAULT_TEXT


@pytest.fixture(scope="session")
def fault_variable(tiny_model_dir: Path) -> dict[str, str]:
    """The environment in which a worker misbehaves over those characters."""
    encoder = Encoder.open(tiny_model_dir)
    tokens = {kind: encoder.encode_text(text).ids[0] for kind, text in FAULT_TEXT.items()}
    return {VARIABLE: ",".join(f"{kind}_on_token:{token}" for kind, token in tokens.items())}


@pytest.fixture(scope="session")
def calibrated_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny decoder with statistics and a temperature in its contract."""
    directory = tmp_path_factory.mktemp("calibrated") / "calibrated"
    shutil.copytree(tiny_model_dir, directory)
    known = contract.read(directory)
    known = dataclasses.replace(
        known, statistics=contract.Statistics(0.25, 0.5, 100), calibration=contract.Calibration(2.0)
    )
    contract.write(known, directory)
    return directory


@pytest.fixture(scope="session")
def server(serve: Callable[..., Any], calibrated_dir: Path, fault_variable: dict[str, str]) -> Any:
    """The server that most tests talk to: one calibrated model, no key."""
    return serve(calibrated_dir, "--log-level", "debug", "--log-json", **fault_variable)


@pytest.fixture(scope="session")
def http(server: Any) -> Iterator[httpx2.Client]:
    """A client of it."""
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client
