"""Errors that a user can mend: one class per exit code of the command, and one way to show foreign text in a line."""

from pathlib import PurePath


class RcmaeError(Exception):
    """Base of all errors that end the command with one line instead of a traceback."""

    exit_code = 1


class ConfigError(RcmaeError, ValueError):
    """The command line or the configuration is wrong (exit code 2). May hold several lines, one per fault."""

    exit_code = 2


class DataError(RcmaeError, ValueError):
    """The data cannot be used: missing, empty, or too much of it broken (exit code 3)."""

    exit_code = 3


class CheckpointError(RcmaeError, ValueError):
    """No checkpoint or weight file can be loaded as asked (exit code 4)."""

    exit_code = 4


class NumericError(RcmaeError, ArithmeticError):
    """Loss, gradients or weights are no longer finite (exit code 5)."""

    exit_code = 5


class MachineError(RcmaeError, OSError):
    """The machine refuses: disk, memory, permissions, or another run holds the lock (exit code 6)."""

    exit_code = 6

    def __init__(self, message: str) -> None:
        super().__init__(message)


class Preempted(RcmaeError):  # noqa: N818  a stop, no error
    """A signal asked the run to stop; its state is saved and the same command goes on (exit code 75)."""

    exit_code = 75


def shown(text: str | PurePath) -> str:
    """Foreign text (a file name, a key) as one printable line: control, bidi and undecodable characters escaped."""
    raw = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in raw)
