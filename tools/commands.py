"""A verb of this command as a process of its own: begun, ended with its parent, and what it said last."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from core.errors import RcmaeError, error_of, shown
from core.worker import end_with_parent

ROOT = Path(__file__).resolve().parent.parent
TAIL_BYTES = 4096


def begin_command(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """Begin `rcmae ARGUMENTS`; what it says is appended to the file `log`.

    It has a session of its own, so that Ctrl-C in a terminal reaches its parent alone, and is killed with that parent.

    Args:
        environment: set beside what is set already.
    """
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # -P: a folder called tools where the user stands must not be taken for ours.
    command = [sys.executable, "-P", "-m", "tools.cli", *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(  # noqa: S603  no shell
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "PYTHONPATH": paths, **(environment or {})}, preexec_fn=end_with_parent,
        )  # fmt: skip


def last_line(log: Path) -> str:
    """The last line that a command has said so far, "" for none; foreign text."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def failure(code: int, log: Path, of: str = "") -> RcmaeError:
    """The error of a command that ended with `code`: its own last line, and where the others are.

    Args:
        of: what the command was, for the beginning of the line.
    """
    text = last_line(log) or "no output"
    return error_of(code, f"{of}{shown(log)}: {text.removeprefix('error: ')}")
