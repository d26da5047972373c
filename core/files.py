"""Durable output. Everything that must survive a crash is written through a `FileSystem`; tests pass one that crashes.

Protocol (design of record: docs/architecture.md, "Nothing lost"): write into a fresh temporary name beside the target,
fsync the file, fsync the folder, rename, fsync the parent. A name that does not start with `.tmp-` is complete.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from pathlib import Path

from core.errors import MachineError, shown

MAX_NAME_BYTES = 255  # of a file name, on every file system that matters


class FileSystem:
    """The few operations that all durable output is made of, so that a test can stop the process at any of them."""

    def make_dir(self, path: Path) -> None:
        """Create one folder that must not exist yet."""
        path.mkdir()

    def write(self, path: Path, data: bytes) -> None:
        """Create `path`, which must not exist, write all of `data`, and bring it to the disk."""
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def sync_dir(self, path: Path) -> None:
        """Bring the names inside a folder to the disk."""
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or folder; a file replaces the old one at once, an existing folder is never replaced."""
        if target.is_dir():
            raise FileExistsError(errno.EEXIST, "will not replace a folder", str(target))
        source.rename(target)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and what is in it."""
        shutil.rmtree(path)

    def free_bytes(self, path: Path) -> int:
        """Bytes that may still be written on the file system of `path`."""
        return shutil.disk_usage(path).free


def beside(path: Path, kind: str) -> Path:
    """A name of this process alone beside `path`, for what is being written (`tmp`) or deleted (`del`).

    It tells the name of the path, or where a file name cannot be that long, a digest of it.
    """
    name = f".{kind}-{path.name}-{os.getpid()}"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = f".{kind}-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]}-{os.getpid()}"
    return path.parent / name


def replace_file(path: Path, data: bytes, fs: FileSystem | None = None) -> None:
    """Write a single file so that readers see the old or the new content, never a part; safe in a crash."""
    fs = fs or FileSystem()
    temporary = beside(path, "tmp")
    temporary.unlink(missing_ok=True)
    try:
        fs.write(temporary, data)
        fs.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fs.sync_dir(path.parent)


def replace_dir(path: Path, files: dict[str, bytes], fs: FileSystem | None = None) -> None:
    """Write a folder of files whole: into a temporary folder first, the old folder out of the way, then renamed in."""
    fs = fs or FileSystem()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (beside(path, kind) for kind in ("tmp", "del"))
    shutil.rmtree(temporary, ignore_errors=True)
    fs.make_dir(temporary)
    try:
        for name, data in files.items():
            fs.write(temporary / name, data)
        fs.sync_dir(temporary)
        if path.exists():
            fs.rename(path, old)
        fs.rename(temporary, path)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fs.sync_dir(path.parent)
    if old.exists():
        fs.remove_tree(old)


def require_space(path: Path, needed_bytes: int, what: str, fs: FileSystem | None = None) -> None:
    """Raise MachineError if `needed_bytes` do not fit on the file system of the existing folder `path`."""
    free = (fs or FileSystem()).free_bytes(path)
    if free < needed_bytes:
        raise MachineError(
            f"{shown(path)}: disk full: {what} needs {needed_bytes / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free; "
            "free some space and give the same command again"
        )


class RunLock:
    """One writer per run directory: a lock file that names its owner and dies with the process.

    A POSIX record lock on the file: not inherited by forked loader workers (an orphan cannot hold it), released by the
    kernel when the owner dies, whatever kills it. The content is only for the message to a second process.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock at once or raise MachineError naming host, pid and start time of the owner."""
        self._path = path
        self._file = path.open("a+")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = self._owner()
            self._file.close()
            raise MachineError(
                f"{shown(path.parent)}: in use by {owner}; wait for it, stop it, or give another out="
            ) from None
        self._file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%F %T %z")}, self._file)
        self._file.flush()

    def _owner(self) -> str:
        try:
            self._file.seek(0)
            owner = json.loads(self._file.read(4096))
            return f"pid {int(owner['pid'])} on {shown(owner['host'])} since {shown(owner['started'])}"
        except (ValueError, KeyError, TypeError):
            return "another process"

    def release(self) -> None:
        """Give the run directory back."""
        self._file.close()
