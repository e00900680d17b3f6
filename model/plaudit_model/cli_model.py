"""`plaudit model`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from .cli import JsonOption, ModelArgument, read_conversations, show_agreement

app = typer.Typer(no_args_is_help=True)

_notes = Console(stderr=True)


@app.callback()
def model() -> None:
    """Make other models of a model."""


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="The directory to write; it must not be there yet.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="For ONNX Runtime. The format is always named.")] = False,
    dtype: Annotated[Literal["float32", "int8"], typer.Option(help="Of the graph.")] = "float32",
    mode: Annotated[
        Literal["exact", "fast"] | None, typer.Option(help="To serve it in.", show_default="the contract's")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSONL with items to compare; default: 64 of the starter tasks.", exists=True, dir_okay=False
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=2, help="Compare at most this many responses.")] = 1000,
    allow_drift: Annotated[
        bool, typer.Option("--allow-drift", help="Keep a graph that fails the comparison; the contract says so.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint for another runtime, once its scores were compared with plain fp32 transformers.

    float32 must agree as closely as `plaudit verify` asks. int8, for CPUs, must keep the order of the scores; compare
    it on text like yours (--data). Exit code 1, and nothing written, if it does not.

    plaudit model export --onnx runs/first/model --dtype int8 --data held-out.jsonl --out runs/first/int8
    plaudit serve runs/first/int8
    """
    if not onnx:
        raise typer.BadParameter("name the format: --onnx", param_hint="--onnx")
    if out.exists():
        raise typer.BadParameter(f"{out} is there already; choose another directory", param_hint="--out")
    from .infer import resolve
    from .onnx_export import ExportOptions, export_onnx

    options = ExportOptions(dtype, mode, allow_drift)
    with _notes.status("reading the model") as status:
        result, numerics = export_onnx(resolve(model), out, options, read_conversations(data, limit), status.update)
    show_agreement(result, numerics, "transformers, eager fp32, one by one", as_json)
    _notes.print(f"wrote {out}", soft_wrap=True)
