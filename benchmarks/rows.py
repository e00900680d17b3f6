"""One row of a benchmark: what was measured, with the hardware, the commit and the date.

Rows are appended to `results/<name>.csv`; a number without its circumstances is not a result.
"""

from __future__ import annotations

import csv
import datetime
import fcntl
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).resolve().parent / "results"


def append(
    name: str, row: Mapping[str, object], about: Mapping[str, object] | None = None, folder: Path = RESULTS
) -> None:
    """Append a row to `results/<name>.csv` and print it. A new column starts a new file header: columns are fixed.
    `about`: the circumstances; those of this machine without a GPU if they are not given."""
    path = folder / f"{name}.csv"
    full = {**row, **(circumstances() if about is None else about)}
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", newline="") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # several processes may append to one file
        stream.seek(0)
        header = next(csv.reader(stream), None)
        if header not in (None, list(full)):
            raise SystemExit(f"{path} has the columns {header}; this run has {list(full)}. Move the old file away")
        writer = csv.DictWriter(stream, list(full))
        if header is None:
            writer.writeheader()
        writer.writerow(full)
    print("  ".join(f"{key}={value}" for key, value in row.items()))


def circumstances() -> dict[str, object]:
    import torch

    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def card(device: torch.device) -> dict[str, object]:
    """The GPU and what drives it; on a CPU all of it is "none"."""
    import torch

    if device.type != "cuda":
        return dict.fromkeys(("card", "driver", "cuda", "triton"), "none")
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    run = subprocess.run(asked, capture_output=True, text=True, check=False)
    return {
        "card": torch.cuda.get_device_name(device),
        "driver": run.stdout.strip() or "unknown",
        "cuda": torch.version.cuda,
        "triton": metadata.version("triton"),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 of repeated measurements."""
    ordered = sorted(values)
    if len(ordered) < 2:
        return {"p20": ordered[0], "p50": ordered[0], "p80": ordered[0]}
    cuts = statistics.quantiles(ordered, n=10, method="inclusive")
    return {"p20": round(cuts[1], 4), "p50": round(statistics.median(ordered), 4), "p80": round(cuts[7], 4)}


def _cpu() -> str:
    import torch

    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"
