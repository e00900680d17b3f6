"""From `plaudit serve` to the first true /readyz, and what the server's processes hold by then.

`cold`: the model's files have left the page cache (posix_fadvise), those of the libraries have not; `warm`: they were
just read. Parts: `imports` from the order to a worker with torch and transformers, `load`, `proof` and `warm_up` as
/info says, `front` what is left: the front's own imports, its tokenizers and HTTP. `cpu` is the CPU time of all
processes by then. Peak resident MiB of the front, of the host that workers are forked from, and of the worker; a page
that host and worker share counts in both, `worker_own` are the worker's private pages alone.

    python benchmarks/ready.py --rounds 3
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import inputs
import rows
from parity import write_minilm
from processes import cpu_seconds, family, free_port, plaudit_command
from shapes import write_decoder_25m

from plaudit_model.infer import resolve

PARTS = ("imports", "load", "proof", "warm_up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=["starter", "decoder", "minilm"])
    arguments = parser.parse_args()
    makers: dict[str, Callable[[Path], Path]] = {
        "starter": lambda _: resolve("starter"),
        "decoder": write_decoder_25m,
        "minilm": write_minilm,
    }
    inputs.check(*(arguments.models or makers))
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models or makers:
            directory = makers[name](Path(folder) / name)
            for cache in ("cold", "warm"):
                measure(name, directory, cache, arguments.rounds)


def measure(name: str, directory: Path, cache: str, rounds: int) -> None:
    started = [start(directory, cache) for _ in range(rounds)]
    total = [one["total"] for one in started]
    middle = started[total.index(sorted(total)[len(total) // 2])]
    rows.append(
        "ready",
        {
            "model": name,
            "cache": cache,
            **{f"ready_s_{part}": value for part, value in rows.spread(total).items()},
            **{f"{part}_s": round(middle[part], 2) for part in ("front", *PARTS, "cpu")},
            **{f"{part}_mib": round(middle[part]) for part in ("front_peak", "host_peak", "worker_peak", "worker_own")},
            "weights_mib": sum(path.stat().st_size for path in directory.glob("*.safetensors")) >> 20,
            "rounds": rounds,
        },
    )


def start(directory: Path, cache: str) -> dict[str, float]:
    """One start: seconds in all and by part, and MiB."""
    for path in directory.iterdir():
        (drop if cache == "cold" else read)(path)
    port = free_port()
    began = time.monotonic()
    process = subprocess.Popen(plaudit_command(directory, port), stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        while not ready(url):
            if process.poll() is not None:
                sys.exit(f"the server stopped with exit code {process.returncode}")
            time.sleep(0.02)
        total, cpu = round(time.monotonic() - began, 3), cpu_seconds(process.pid)
        parts = {part: float(value) for part, value in httpx2.get(f"{url}/info").json()["ready_s"].items()}
        _, host, worker = family(process.pid)
        memory = {"front_peak": peak(process.pid), "host_peak": peak(host), "worker_peak": peak(worker)}
        front = total - sum(parts.values())
        return {"total": total, "front": front, **parts, "cpu": cpu, **memory, "worker_own": own(worker)}
    finally:
        process.terminate()
        process.wait(60)


def ready(url: str) -> bool:
    with contextlib.suppress(httpx2.TransportError):
        return httpx2.get(f"{url}/readyz", timeout=5).status_code == 200
    return False


def read(path: Path) -> None:
    path.read_bytes()


def drop(path: Path) -> None:
    """Its pages leave the page cache: clean ones that nobody maps do so at once."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def peak(pid: int) -> float:
    return _kib(Path(f"/proc/{pid}/status"), "VmHWM:") / 1024


def own(pid: int) -> float:
    """Private pages, which no other process shares."""
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    return (_kib(rollup, "Private_Clean:") + _kib(rollup, "Private_Dirty:")) / 1024


def _kib(path: Path, name: str) -> int:
    return int(path.read_text(encoding="utf-8").split(name)[1].split()[0])


if __name__ == "__main__":
    main()
