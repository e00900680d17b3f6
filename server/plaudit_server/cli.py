"""`plaudit serve`."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from .engine import EngineSettings
    from .served import Models
    from .settings import ServerSettings

Overlong = Literal["error", "truncate_prompt", "truncate_left"]
RenderedText = Literal["refuse", "as-is", "rerender"]
Wait = Literal["active", "passive"]
_DTYPE = "float32, bfloat16, or 8 bits a weight: fp8 (newest GPUs), int8 (any; on CPUs an ONNX export is the fast one)"
_WAIT = "how compute threads wait: passive ones sleep, for cores that others need too"
_CAP = "of a worker's device memory: enforced on CUDA, and predicted before the model is loaded"
_DEVICE = "auto, cpu, cuda or cuda:1; cuda:0,cuda:1 or cpu,cpu: a worker each, and one queue"
_THREADS = "torch's threads, of each worker"
_CPUS = "CPUs of the workers, as 0-3,8; several split them"
_KEY = "API key of every route but the probes"


def serve(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="directory, Hub id or `starter`; NAME=MODEL")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port; 0 takes a free one")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="PLAUDIT_API_KEY", help=_KEY, show_envvar=True)] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="serve other machines without a key")] = False,
    allowed_host: Annotated[list[str] | None, typer.Option(help="a Host name to answer to; repeatable")] = None,
    dtype: Annotated[str | None, typer.Option(help=_DTYPE, show_default="the contract's")] = None,
    mode: Annotated[str | None, typer.Option(help="exact or fast", show_default="the contract's")] = None,
    device: Annotated[str, typer.Option(help=_DEVICE)] = "auto",
    overlong: Annotated[
        Overlong | None, typer.Option(help="of compatibility routes", show_default="each route's")
    ] = None,
    rendered_text: Annotated[RenderedText, typer.Option(help="text in another model's template")] = "refuse",
    token_budget: Annotated[int | None, typer.Option(help="tokens of one batch", show_default="4096")] = None,
    max_wait_ms: Annotated[float | None, typer.Option(help="how long a batch may form", show_default="50")] = None,
    queue_tokens: Annotated[int | None, typer.Option(help="tokens that may wait", show_default="1000000")] = None,
    cache_mb: Annotated[int, typer.Option(min=0, help="memory for scores already given; 0: none")] = 64,
    threads: Annotated[int | None, typer.Option(min=1, help=_THREADS, show_default="torch's choice")] = None,
    cpus: Annotated[str | None, typer.Option(help=_CPUS, show_default="any")] = None,
    wait: Annotated[Wait | None, typer.Option(help=_WAIT, show_default="OpenMP's choice")] = None,
    memory_cap: Annotated[float | None, typer.Option(metavar="GIB", help=_CAP, show_default="none")] = None,
    encode_threads: Annotated[int | None, typer.Option(help="tokenizers", show_default="up to 4")] = None,
    deadline_seconds: Annotated[float, typer.Option(help="of a request that names none")] = 170.0,
    lameduck_seconds: Annotated[float, typer.Option(help="after SIGTERM, time in which work is still taken")] = 0.0,
    drain_seconds: Annotated[float, typer.Option(help="after that, time to finish what was taken")] = 45.0,
    log_level: Annotated[str, typer.Option(help="debug also logs successes")] = "info",
    log_json: Annotated[bool, typer.Option("--log-json", help="log lines as JSON")] = False,
) -> None:
    """Serve the scores of one or several reward models over HTTP."""
    given = dict(locals())

    from . import logs
    from .engine import EngineSettings
    from .settings import ServerSettings

    logs.configure(log_level, as_json=log_json)
    settings = ServerSettings(**_fields(ServerSettings, given), allowed_hosts=tuple(allowed_host or ()))
    given |= {"cpus": _cpus(cpus), "cache_bytes": cache_mb << 20}
    given["memory_cap"] = None if memory_cap is None else int(memory_cap * (1 << 30))
    engine = EngineSettings(**_fields(EngineSettings, given))
    run(models, settings, engine)


def run(names: list[str], settings: ServerSettings, engine: EngineSettings) -> None:
    """Serve until a signal. Raises SettingsError, ModelError or WorkerFailed, each with one clear line."""
    import asyncio

    import uvloop

    from .app import build_app
    from .lifecycle import Lifecycle, allow_connections, listen
    from .metrics import Metrics
    from .served import Models, Name, open_model

    allow_connections()
    with listen(settings) as listener:  # first, so that an address that is taken fails before any download
        metrics = Metrics()
        models = Models([open_model(name, settings, engine, metrics) for name in Name.all(names)])
        app = build_app(settings, models, metrics)

        async def main() -> None:
            port = listener.getsockname()[1]
            await Lifecycle(settings, app, models, listener).run(lambda: announce(settings, models, port))

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())


def announce(settings: ServerSettings, models: Models, port: int) -> None:
    """Say what is served, where, and how to ask for a score."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}"
    for model in models:
        info, template = model.loaded, model.contract.template
        facts = {
            "model": f"{model.id}, {info.architecture}, {info.parameters / 1e6:,.1f} M parameters",
            "contract": f"{template.kind} template {template.sha256[:12]}, at most {info.max_length:,} tokens",
            "revision": info.revision, "numerics": info.numerics, "device": info.device, "path": info.path,
            "sharing": info.sharing,
        }  # fmt: skip
        for name, value in facts.items():
            console.print(f"{name:>10}  {value}", markup=False)
    console.print(_examples(settings, models, url), markup=False)
    console.print(f"ready: {url}", markup=False)


def _examples(settings: ServerSettings, models: Models, url: str) -> str:
    """A curl line and a Python line that work as they stand."""
    names = [model.id for model in models]
    field, argument = (f'"model": "{names[0]}", ', f', model="{names[0]}"') if len(names) > 1 else ("", "")
    key = ' -H "authorization: Bearer $PLAUDIT_API_KEY"' if settings.api_key else ""
    curl = f"""curl -s {url}/score{key} -d '{{{field}"prompt": "Name a prime.", "response": "Seven."}}'"""
    call = f'Client("{url}"{argument}).score("Name a prime.", "Seven.")'
    return f"\n  {curl}\n  {_python()} -c 'from plaudit import Client; print({call})'\n"


def _python() -> str:
    """This interpreter, as short as a shell in this directory finds it: a fresh clone's is not on the path."""
    if shutil.which("python") == sys.executable:
        return "python"
    here, path = Path.cwd(), Path(sys.executable)
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _cpus(text: str | None) -> tuple[int, ...]:
    """The numbers of `0-3,8`. Raises SettingsError for what is no such list, or not CPUs of this process."""
    from .settings import SettingsError

    ours = os.sched_getaffinity(0)
    if text is None:
        return ()
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text, re.ASCII):
        raise SettingsError(f"cpus is a list like 0-3,8, got {text!r}")
    ends = [part.partition("-")[::2] for part in text.split(",")]
    runs = [(int(low), int(high or low)) for low, high in ends]
    if not all({low, high} <= ours and low <= high for low, high in runs):
        raise SettingsError(f"cpus {text!r}: this process may run on {sorted(ours)}")
    return tuple(sorted({cpu for low, high in runs for cpu in range(low, high + 1)} & ours))


def _fields(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given for the fields of a kind of settings; the others keep their defaults."""
    return {name: given[name] for name in kind.__dataclass_fields__ if given.get(name) is not None}
