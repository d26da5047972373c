"""The directory of one run: its lock, resolved configuration, environment, logs, checkpoints and final figures."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from core.config import Config, differences, dump_config, read_yaml
from core.errors import ConfigError, MachineError, shown
from core.files import FileSystem, RunLock, replace_file
from core.machine import environment

LOCK_NAME = ".lock"


class RunDirectory:
    """An `out=` that this process owns: empty, or holding an earlier part of the same run."""

    def __init__(self, path: Path, config: Config, harmless: Collection[str]) -> None:
        """Create or reopen the directory and take its lock.

        Args:
            harmless: dotted keys (or groups) that may differ from the earlier part of the run.
        Raises: MachineError if it cannot be written or another process owns it; ConfigError if it holds other files, or
            a run with another configuration. It is never overwritten.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(path / LOCK_NAME)
        except MachineError:
            raise
        except OSError as error:
            raise MachineError(
                f"{shown(path)}: cannot be written: {error.strerror}; give a folder that can be written as out="
            ) from None
        try:
            self._claim(config, harmless)
        except BaseException:
            self._lock.release()
            raise

    def _claim(self, config: Config, harmless: Collection[str]) -> None:
        stored = self.path / "config.yaml"
        if stored.exists():
            before, _ = read_yaml(stored)
            changed = [
                line
                for line in differences(before, config.model_dump(mode="json"))
                if not any(line.startswith((f"{key}:", f"{key}.")) for key in harmless)
            ]
            if changed:
                raise ConfigError(
                    "\n".join(
                        f"out={shown(self.path)}: holds a run with another {line}; give another out=, or the old value"
                        for line in changed
                    )
                )
        elif any(
            entry.name not in {LOCK_NAME, "checkpoints"} for entry in self.path.iterdir() if not _unfinished(entry)
        ):
            raise ConfigError(f"out={shown(self.path)}: holds other files and no run; give a new or empty folder")
        for entry in [*self.path.iterdir(), *self.path.glob("pictures/*")]:
            if _unfinished(entry):  # of a process that was killed: the lock is ours
                FileSystem().remove_tree(entry) if entry.is_dir() else entry.unlink()
        replace_file(stored, dump_config(config).encode())
        replace_file(self.path / "env.json", json.dumps(environment(), indent=1).encode())

    def write_summary(self, figures: Mapping[str, Any]) -> None:
        """Write the final figures."""
        replace_file(self.path / "summary.json", json.dumps(figures, indent=1).encode())

    def close(self) -> None:
        """Give the lock back."""
        self._lock.release()


def _unfinished(entry: Path) -> bool:
    return entry.name.startswith((".tmp-", ".del-"))
