"""Where the time before the first score went."""

from __future__ import annotations

import time


class Laps:
    """Seconds by what they were spent on: each `lap` names what was done since the last."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + now - self._last, 3)
        self._last = now
