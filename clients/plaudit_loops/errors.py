"""Everything this package raises on purpose. What the SDK and `plaudit_model` raise passes through.

ConfigError   the configuration is not valid
DataError     a row of the data cannot be used
RunExists     the output directory belongs to another run
NotWritten    the run cannot be written any more; what is on disk is whole and can be resumed
Diverged      too many updates had a gradient that is not finite
PeerFailed    another process of the run could not do its part, or was told to stop
"""

from __future__ import annotations


class LoopError(Exception):
    """Base of the errors of this package. `exit_code` is what the command line exits with."""

    exit_code = 70


class ConfigError(LoopError):
    exit_code = 78


class DataError(LoopError):
    exit_code = 65


class RunExists(LoopError):
    exit_code = 2


class NotWritten(LoopError):
    exit_code = 75


class Diverged(LoopError):
    exit_code = 1


class PeerFailed(LoopError):
    exit_code = 75
