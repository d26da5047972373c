"""Errors that a user can mend: one class per exit code of the command, and one way to show foreign text in a line."""

import errno
from pathlib import PurePath

OUT_OF_MEMORY = "out of memory: give a higher engine.accumulation, or a smaller model or img_size"


class RcmaeError(Exception):
    """Base of all errors that end the command with one line instead of a traceback."""

    exit_code = 1
    speaks = True  # False on the processes of a run that leave the line to another
    final = True  # False where starting the same command again may help


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

    def __init__(self, message: str, final: bool = True) -> None:
        super().__init__(message)
        self.final = final


class DistributedError(RcmaeError, RuntimeError):
    """A process of the run is dead, stuck, or out of step with the others (exit code 7)."""

    exit_code = 7
    final = False


class RanksDisagree(DistributedError):  # noqa: N818  what it is, in a word
    """The processes of a run were given different configurations, code or data; no restart mends that."""

    final = True


class Preempted(RcmaeError):  # noqa: N818  a stop, no error
    """A signal asked the run to stop; its state is saved and the same command goes on (exit code 75)."""

    exit_code = 75


def machine_error(error: OSError) -> MachineError:
    """What the operating system refused, as one of ours."""
    where = shown(str(error.filename)) if error.filename else "the disk of out= or cache="
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return MachineError(f"{where}: disk full; free some space and give the same command again")
    return MachineError(f"{where}: {error.strerror or error}")


_BY_CODE = {cls.exit_code: cls for cls in RcmaeError.__subclasses__()}


def error_of(code: int, message: str) -> RcmaeError:
    """The error of an exit code, as another process of the run raised it."""
    return _BY_CODE.get(code, RcmaeError)(message)


def shown(text: str | PurePath, most: int | None = None) -> str:
    """Foreign text (a file name, a key) as one printable line: control, bidi and undecodable characters escaped.

    Args:
        most: characters; of a longer line the middle is left out, for names often differ at one of their ends.
    """
    raw = str(text).encode("utf-8", "backslashreplace").decode("utf-8")
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in raw)
    if most is None or len(line) <= most:
        return line
    return f"{line[: most // 2]}…{line[len(line) - (most - 1 - most // 2) :]}"
