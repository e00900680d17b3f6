"""What this package raises on purpose, beside what the SDK and `plaudit_model` have for it: ConfigurationError for a
configuration, InvalidInput for a row of the data, RunExists, NotWritten and Diverged (`plaudit_model.run_folder`)."""

from __future__ import annotations


class LoopError(Exception):
    """A step could not be taken, and the run can go on from before it. `exit_code` is that of the cause."""

    exit_code = 70


class PeerFailed(LoopError):
    """Another process of the run could not do its part, or was told to stop."""

    exit_code = 75
