"""Kill real runs and start them again: a fork server that has torch imported, and a file layer that dies at any point.

`ForkServer` is a process that forks a child per run, so that a kill and a restart cost a fraction of a second.
`CrashingFileSystem` sends SIGKILL to its own process at the n-th of the points that it passes.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from core.files import FileSystem

ROOT = Path(__file__).resolve().parent.parent


class CrashingFileSystem(FileSystem):
    """Dies at point number `crash_at` (1-based); else only counts. Points lie before, inside and after each call."""

    def __init__(self, crash_at: int | None = None) -> None:
        self.crash_at = crash_at
        self.points = 0

    def _point(self) -> None:
        self.points += 1
        if self.points == self.crash_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def make_dir(self, path: Path) -> None:
        self._point()
        super().make_dir(path)
        self._point()

    def write(self, path: Path, data: bytes) -> None:
        self._point()
        if self.points + 1 == self.crash_at:
            path.write_bytes(data[: len(data) // 2])  # what a crash in the middle leaves
        self._point()
        super().write(path, data)
        self._point()

    def sync_dir(self, path: Path) -> None:
        self._point()
        super().sync_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._point()
        super().rename(source, target)
        self._point()

    def remove_tree(self, path: Path) -> None:
        self._point()
        if self.points + 1 == self.crash_at:
            next(path.iterdir()).unlink()
        self._point()
        super().remove_tree(path)
        self._point()


class FullFileSystem(FileSystem):
    """A disk with so many bytes left for what is written; `honest` tells whether it admits that beforehand."""

    def __init__(self, room_bytes: int, honest: bool) -> None:
        self.room_bytes, self.honest = room_bytes, honest

    def write(self, path: Path, data: bytes) -> None:
        if len(data) > self.room_bytes:
            path.write_bytes(data[: self.room_bytes])
            raise OSError(28, "No space left on device", str(path))
        self.room_bytes -= len(data)
        super().write(path, data)

    def free_bytes(self, path: Path) -> int:
        return self.room_bytes if self.honest else super().free_bytes(path)


class ForkServer:
    """Starts pretraining runs quickly. Use as a context manager."""

    def __enter__(self) -> "ForkServer":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness"], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._receive() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=20)

    def start(self, overrides: list[str], log: Path, crash_at: int | None = None) -> int:
        """Fork a run; returns its pid."""
        self._send({"overrides": overrides, "log": str(log), "crash_at": crash_at})
        return int(self._receive())

    def wait(self, pid: int) -> int:
        """Exit code of a run, negative for the signal that ended it."""
        self._send({"wait": pid})
        return int(self._receive())

    def run(self, overrides: list[str], log: Path, crash_at: int | None = None) -> int:
        """Start a run and wait for its end."""
        return self.wait(self.start(overrides, log, crash_at))

    def _send(self, message: dict[str, Any]) -> None:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> str:
        return self._process.stdout.readline().strip()


def kill_after(server: ForkServer, overrides: list[str], log: Path, seconds: float) -> int:
    """Start a run, SIGKILL it after so many seconds, and return its exit code."""
    pid = server.start(overrides, log)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):  # it was done already
        os.kill(pid, signal.SIGKILL)
    return server.wait(pid)


def fresh(path: Path) -> Path:
    """An absent path, whatever was there."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def _run(message: dict[str, Any]) -> int:
    from core.config import load_config
    from pretrain.run import pretrain
    from pretrain.settings import PretrainConfig
    from tools.cli import guarded

    fs = CrashingFileSystem(message["crash_at"])
    code = guarded(lambda: pretrain(load_config(PretrainConfig, None, message["overrides"]), fs=fs))
    Path(message["log"] + ".points").write_text(str(fs.points))
    return code


def _serve() -> None:
    import pretrain.run  # noqa: F401  imported once here, not in every child

    print("ready", flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        if "wait" in message:
            _, status = os.waitpid(message["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(0)
        os._exit(_run(message))


if __name__ == "__main__":
    _serve()
