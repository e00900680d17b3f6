"""When a lost worker is started again, and when nobody should wait for it. Pure: moments go in, delays come out."""

from __future__ import annotations

from collections import deque

_MOST_DEATHS, _WITHIN = 5, 60.0
_LONGEST = 30.0


class RestartPolicy:
    """Delays of 0, 1, 2, 4 ... 30 seconds; hopeless from the fifth death within a minute until a batch is answered.

    Only deaths that say something of the worker count: while loading, or idle. A worker that has passed its
    self-test and dies over a batch says something of an item, and the batcher finds out which. `streak` are those
    since the last batch that was answered.
    """

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=_MOST_DEATHS)
        self.streak = 0
        self._hopeless = False

    def died(self, now: float) -> float | None:
        """Seconds to wait before the next start; None: it is hopeless."""
        self._deaths.append(now)
        self.streak += 1
        self._hopeless |= len(self._deaths) == _MOST_DEATHS and now - self._deaths[0] < _WITHIN
        if self._hopeless:
            return None
        return 0.0 if self.streak == 1 else min(2.0 ** (self.streak - 2), _LONGEST)

    def served(self) -> None:
        """A batch was answered: the next delay is the shortest again."""
        self.streak, self._hopeless = 0, False
