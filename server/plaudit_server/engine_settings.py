"""How an engine is set up."""

from __future__ import annotations

from dataclasses import dataclass

from .messages import LoadOrder
from .settings import SettingsError
from .worker import Wait


@dataclass(frozen=True)
class EngineSettings:
    """`token_budget`: packed tokens of a batch. `max_wait_ms`, `settle_ms`: the batching window (see `batcher`).
    `queue_tokens`: what may wait in each class, `queue_bytes` what may be held altogether. `hang_seconds`: a
    batch that takes longer has its worker killed, and so has a model that takes longer than `load_seconds` to load.
    `device` is one, or several with commas between them: a worker each. `threads` compute in each, on `cpus` alone
    if any are named, which the workers split; `wait` is how they wait for work. `memory_cap` is each worker's, in
    bytes. None: what the contract, torch or OpenMP says, or everything. Raises SettingsError."""

    token_budget: int = 4096
    max_wait_ms: float = 50.0
    settle_ms: float = 3.0
    look_ahead: int = 64
    queue_tokens: int = 1_000_000
    queue_bytes: int = 512 << 20
    cache_bytes: int = 64 << 20
    hang_seconds: float = 300.0
    load_seconds: float = 1800.0
    threads: int | None = None
    cpus: tuple[int, ...] = ()
    wait: Wait | None = None
    device: str = "auto"
    dtype: str | None = None
    mode: str | None = None
    memory_cap: int | None = None

    def __post_init__(self) -> None:
        devices = self.devices
        for device in devices if len(devices) > 1 else ():
            if device in ("", "auto", "cuda"):
                raise SettingsError(f"device {self.device!r}: of several each is named, as cuda:0,cuda:1")
            if device != "cpu" and devices.count(device) > 1:
                raise SettingsError(f"device {self.device!r}: two workers on {device} would only share it")
        if 0 < len(self.cpus) < len(devices):
            raise SettingsError(f"{len(devices)} workers cannot split {len(self.cpus)} of the CPUs")

    @property
    def devices(self) -> list[str]:
        """One a worker."""
        return [device.strip() for device in self.device.split(",")]

    def orders(self, model: str) -> list[LoadOrder]:
        """What each worker is told to load. The CPUs are split into contiguous parts."""
        n, cpus = len(self.devices), self.cpus
        parts = [cpus[i * len(cpus) // n : (i + 1) * len(cpus) // n] for i in range(n)]
        return [
            LoadOrder(
                model, device, self.dtype, self.mode, self.threads, self.token_budget, part, self.memory_cap, workers=n
            )
            for device, part in zip(self.devices, parts, strict=True)
        ]
