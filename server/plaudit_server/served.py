"""The models that one server serves: who they are, and which of them a request means."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from plaudit_model import infer
from plaudit_model.contract import RewardContract
from plaudit_model.encode import Encoder

from .domain import ModelInfo
from .encoding import EncodingPool
from .engine import Engine, EngineSettings, State
from .errors import RequestError
from .metrics import Metrics, ModelMetrics
from .rendered import RenderedRule
from .settings import ServerSettings, SettingsError

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


@dataclass(frozen=True)
class Name:
    """One argument of `plaudit serve`: what to load, and the id to serve it under."""

    id: str
    source: str

    @classmethod
    def parse(cls, argument: str) -> Name:
        """`name=path`, or a path, Hub id or word whose last part becomes the id. Raises SettingsError."""
        head, alias, source = argument.partition("=")
        if not alias or "/" in head:
            source = argument
            head = Path(source).resolve().name if source.strip("./") == "" else source.rstrip("/").rsplit("/", 1)[-1]
        if not _ID.fullmatch(head) or not source:
            what = source or "MODEL"
            raise SettingsError(f"a model cannot be served as {head!r}; give it a name: plaudit serve NAME={what}")
        return cls(head, source)

    @classmethod
    def all(cls, arguments: Sequence[str]) -> list[Name]:
        """Those of a command line. Raises SettingsError if two are the same, with names that tell them apart: those of
        the directories that hold them, where these differ."""
        names: dict[str, Name] = {}
        for name in map(cls.parse, arguments):
            if other := names.get(name.id):
                first, second = (Path(each.source).absolute().parent.name for each in (other, name))
                if first == second or not (_ID.fullmatch(first) and _ID.fullmatch(second)):
                    first, second = f"{name.id}-1", f"{name.id}-2"
                line = f"plaudit serve {first}={other.source} {second}={name.source}"
                raise SettingsError(f"two models have the name {name.id}; give them others: {line}")
            names[name.id] = name
        return list(names.values())


@dataclass(eq=False)
class Served:
    """One model: its contract, its tokenizers, its engine. `info` is there once it has been started."""

    id: str
    contract: RewardContract
    encoders: EncodingPool
    engine: Engine
    metrics: ModelMetrics
    info: ModelInfo | None = None

    async def start(self) -> ModelInfo:
        """Load the model and the tokenizers. Raises WorkerFailed."""
        _, info = await asyncio.gather(asyncio.to_thread(self.encoders.warm), self.engine.start())
        self.info = info
        return info

    @property
    def loaded(self) -> ModelInfo:
        """What the worker said of the model. Raises RequestError before it has."""
        if self.info is None:
            raise RequestError("unavailable", "the model is being loaded")
        return self.info

    @property
    def state(self) -> State:
        """The engine's; `starting` for as long as the tokenizers are being read."""
        return "starting" if self.info is None and self.engine.state == "ready" else self.engine.state

    async def close(self) -> None:
        """End the threads and the workers."""
        self.encoders.close()
        await self.engine.close()


class Models:
    """All served models, in the order they were named. Owns whether the server has begun to leave (`leaving`):
    it then says that it is not ready, and still answers."""

    def __init__(self, models: Sequence[Served]) -> None:
        if not models:
            raise SettingsError("name at least one model to serve")
        self._models = {model.id: model for model in models}
        self.leaving = False

    def __iter__(self) -> Iterator[Served]:
        return iter(self._models.values())

    def find(self, name: str | None) -> Served:
        """The model with an id, or id@revision; the only one where no name is given. Raises RequestError."""
        if name is None:
            if len(self._models) > 1:
                names = ", ".join(self._models)
                raise RequestError("ambiguous_model", f"several models are served: {names}; name one", param="model")
            return next(iter(self))
        id, pinned, revision = name.partition("@")
        model = self._models.get(id)
        if model is None:
            names = ", ".join(self._models)
            raise RequestError("unknown_model", f"no such model is served here; there is {names}", param="model")
        if pinned and revision != model.loaded.revision:
            here = model.loaded.revision
            raise RequestError("unknown_model", f"{id} is served in revision {here}, not in that one", param="model")
        return model

    @property
    def states(self) -> dict[str, State]:
        """Each model's state; `draining` for all once the server leaves."""
        return {model.id: "draining" if self.leaving else model.state for model in self}


def open_model(name: Name, settings: ServerSettings, engine: EngineSettings, metrics: Metrics) -> Served:
    """Everything but the weights: those are read by the worker. Raises ModelError."""
    directory = infer.resolve(name.source)
    contract = infer.contract_for(directory)
    encoder = Encoder.open(directory, contract)
    rule = RenderedRule(settings.rendered_text, contract.template.source)
    encoders = EncodingPool(encoder, settings.encode_threads, rule, settings.limits.item_bytes)
    observer = metrics.of_model(name.id)
    scorer = Engine(str(directory), engine, observer)
    observer.follow(
        queue_tokens=lambda: scorer.queued_tokens, queue_items=lambda: scorer.open_items,
        token_budget=lambda: scorer.token_budget, asleep=lambda: scorer.state == "asleep",
        workers_ready=lambda: sum(lane.phase == "ready" for lane in scorer.lanes),
    )  # fmt: skip
    return Served(name.id, contract, encoders, scorer, observer)
