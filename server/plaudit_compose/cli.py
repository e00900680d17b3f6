"""`plaudit compose`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compose(
    rewards: Annotated[Path, typer.Argument(metavar="REWARDS", help="TOML file with [[terms]].")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port; 0 takes a free one")] = 9000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="PLAUDIT_COMPOSE_KEY",
            help="that callers must bring; models' servers get PLAUDIT_API_KEY",
            show_envvar=True,
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="serve other machines without a key")] = False,
    allowed_host: Annotated[list[str] | None, typer.Option(help="a Host name to answer to; repeatable")] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="run programs of code terms, isolated")] = False,
    allow_code_unisolated: Annotated[
        bool, typer.Option("--allow-code-unisolated", help="with limits alone: inside a container of its own")
    ] = False,
    wait: Annotated[float, typer.Option(min=0, help="seconds that the models' servers may take to be ready")] = 300.0,
) -> None:
    """Serve rewards put together from models' scores and from what can be verified.

    A trainer points at it as at `plaudit serve`: /get_reward (OpenRLHF; references in `labels`) and /score (with
    `reference`). All terms and their keys are in docs/rewards.md. In rewards.toml, for example:

    \b
    floor = -5.0

    \b
    [[terms]]
    kind = "model"
    url = "http://127.0.0.1:8000"
    clip = [-4, 4]

    \b
    [[terms]]
    kind = "numeric"
    weight = 2.0

    \b
    [[terms]]
    kind = "length"
    limit = 4000
    weight = 0.001
    """
    import asyncio
    import signal
    import sys

    import uvicorn

    from plaudit.rewards.compose import Composer
    from plaudit.rewards.config import read_rewards
    from plaudit_server import logs, protocol
    from plaudit_server.lifecycle import allow_connections, listen
    from plaudit_server.settings import ServerSettings

    from .app import build_app

    logs.configure("info", as_json=False)
    settings = ServerSettings(
        host=host, port=port, api_key=api_key, insecure=insecure, allowed_hosts=tuple(allowed_host or ())
    )
    found = read_rewards(rewards)
    allow_connections()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn finishes what it has, and raises the signal again

    async def main() -> None:
        composer = Composer(found, allow_code=allow_code or allow_code_unisolated, isolated=not allow_code_unisolated)
        await composer.start(wait)
        config = uvicorn.Config(build_app(settings, composer), **protocol.arguments(settings.limits))
        typer.echo(f"{composer.identity.model}@{composer.identity.revision}: {', '.join(t.name for t in found.terms)}")
        typer.echo(f"ready: http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}")
        try:
            await uvicorn.Server(config).serve(sockets=[listener])
        finally:
            await composer.close()

    with listen(settings) as listener:
        asyncio.run(main())
