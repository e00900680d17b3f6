"""From the scores of a reward model to the reward of a sample. Pure functions; float64, NaN for "no score".

Nothing here invents a number: a sample that one endpoint could not score has no combined score.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]


def combine(scores_ES: Scores, uncertainty: float, *, worst: bool = False) -> Scores:
    """`mean - uncertainty * std` over the endpoints, (S,): what an ensemble agrees on (Coste et al. 2310.02743 take the
    variance; the standard deviation has the scores' unit); or their `worst`. std with E - 1; one endpoint is itself."""
    deviation_S = scores_ES.std(0, ddof=1) if len(scores_ES) > 1 else 0.0
    combined: Scores = (scores_ES.min(0) if worst else scores_ES.mean(0)) - uncertainty * deviation_S
    return combined


def clip(scores_S: Scores, limit: float) -> Scores:
    """Scores within +-limit; a limit of 0 leaves them."""
    clipped: Scores = np.clip(scores_S, -limit, limit) if limit else scores_S
    return clipped


def without_end(scores_S: Scores, ended_S: NDArray[np.bool_], penalty: float) -> Scores:
    """Less `penalty` for a response that reached the length limit without its end token."""
    return np.where(ended_S, scores_S, scores_S - penalty)


def length_ramp(lengths_S: NDArray[np.int64], limit: int, ramp: int, factor: float) -> Scores:
    """What is taken off for length: 0 up to `limit - ramp` tokens, then linearly up to `factor` at `limit` (DAPO's soft
    overlong punishment, 2503.14476, eq. 13)."""
    if not ramp:
        return np.zeros(len(lengths_S))
    over = np.clip(lengths_S - (limit - ramp), 0, ramp)
    return factor * over / ramp
