"""Training checkpoints: safetensors and a JSON manifest, written so that a crash at any instant loses nothing.

    checkpoints/step_0000250/   complete: every file is listed in manifest.json with size and SHA-256
    checkpoints/.tmp-...        being written; removed at the next start
    checkpoints/.del-...        being deleted; removed at the next start
    checkpoints/.bad-...        did not verify; moved aside, never deleted, for a person to look at

There is no pointer file: the newest checkpoint that verifies is the latest. The protocol: docs/architecture.md.
"""

import hashlib
import json
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from core.config import Config
from core.errors import CheckpointError, NumericError, shown
from core.files import FileSystem, require_space

FORMAT = 1
MANIFEST = "manifest.json"

logger = logging.getLogger("rcmae")

Tensors = dict[str, dict[str, Tensor]]  # file stem -> name -> tensor


class CheckpointConfig(Config):
    """When checkpoints are written and which are kept."""

    every_steps: int = Field(250, gt=0)  # optimizer steps between checkpoints; the last step is always saved
    keep: int = Field(2, ge=2)  # newest good ones that stay
    keep_every_steps: int | None = Field(None, gt=0)  # good ones at multiples of this stay for ever


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory."""

    step: int
    tensors: Tensors
    state: dict[str, Any]
    digest: str
    manifest: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run directory. The caller holds the run's lock."""

    def __init__(self, folder: Path, config: CheckpointConfig, fs: FileSystem | None = None) -> None:
        self._folder = folder
        self._config = config
        self._fs = fs or FileSystem()
        self._good: set[int] = set()  # steps verified or written by this process

    def clean(self) -> None:
        """Remove what a dead writer left half-written or half-deleted."""
        for path in [*self._folder.glob(".tmp-*"), *self._folder.glob(".del-*")]:
            self._fs.remove_tree(path)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; damaged newer ones are moved aside with one line each.

        Raises: CheckpointError if there are only damaged ones: that is never taken for a fresh start.
        """
        found, damaged = None, []
        for step in sorted(self._steps(), reverse=True):
            try:
                found = read_checkpoint(self._path(step))
                self._good.add(step)
                break
            except CheckpointError as error:
                damaged.append(f"checkpoint damaged: {error}; moved to {self._move_aside(step).name}")
        for line in damaged:
            logger.warning("%s%s", line, f"; going on from step {found.step}" if found else "")
        if found:
            self._drop_old()  # a crash may have come between writing and dropping
            return found
        bad = sorted(self._folder.glob(".bad-*"))
        if bad:
            raise CheckpointError(
                f"{shown(self._folder)}: no checkpoint verifies, {len(bad)} damaged (the newest {bad[-1].name}); "
                "restore one from a copy, or start anew with another out="
            )
        return None

    def save(self, step: int, tensors: Tensors, state: dict[str, Any], info: dict[str, Any]) -> str:
        """Write the checkpoint of `step` and drop the oldest that need not stay.

        Args:
            tensors: file stem -> name -> tensor, on any device; must be finite.
            state: JSON values that belong to the identity of the run (counted in the digest).
            info: JSON values that do not: versions, machine, time.
        Returns: the digest over all tensors and `state`.
        Raises: NumericError for non-finite tensors; MachineError if the disk is too full.
        """
        _require_finite(tensors)
        num_bytes = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        require_space(self._folder, int(1.2 * num_bytes) + 4096, f"the checkpoint of step {step}", self._fs)
        target = self._path(step)
        if target.exists():
            try:
                return read_checkpoint(target).digest  # the same step of the same run is the same state
            except CheckpointError:
                self._move_aside(step)
        temporary = self._folder / f".tmp-{target.name}-{os.getpid()}"
        try:
            digest = self._write(temporary, step, tensors, state, info)
        except OSError:
            if temporary.exists():
                self._fs.remove_tree(temporary)
            raise
        self._fs.rename(temporary, target)
        self._fs.sync_dir(self._folder)
        self._good.add(step)
        self._drop_old()
        return digest

    def _write(self, folder: Path, step: int, tensors: Tensors, state: dict[str, Any], info: dict[str, Any]) -> str:
        self._fs.make_dir(folder)
        files = {}
        for stem, group in tensors.items():
            data = save({name: tensor.detach().cpu().contiguous() for name, tensor in group.items()})
            files[f"{stem}.safetensors"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            self._fs.write(folder / f"{stem}.safetensors", data)
        digest = _digest(step, files, state)
        manifest = {"format": FORMAT, "step": step, "digest": digest, "state": state, "files": files, "info": info}
        manifest["info"] = {**info, "written": time.strftime("%F %T %z")}
        self._fs.write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        self._fs.sync_dir(folder)
        return digest

    def _drop_old(self) -> None:
        every = self._config.keep_every_steps
        kept = 0
        for step in sorted(self._steps(), reverse=True):
            if kept >= self._config.keep and every and step % every == 0:
                continue
            if not self._verifies(step):
                logger.warning("checkpoint of step %d does not verify; moved to %s", step, self._move_aside(step).name)
            elif kept < self._config.keep:
                kept += 1
            else:
                doomed = self._folder / f".del-{self._path(step).name}-{os.getpid()}"
                self._fs.rename(self._path(step), doomed)
                self._fs.remove_tree(doomed)

    def _verifies(self, step: int) -> bool:
        if step not in self._good:
            try:
                read_checkpoint(self._path(step))
            except CheckpointError:
                return False
            self._good.add(step)
        return True

    def _move_aside(self, step: int) -> Path:
        source = self._path(step)
        number = sum(1 for _ in self._folder.glob(f".bad-{source.name}*"))
        aside = self._folder / f".bad-{source.name}-{number}"
        self._fs.rename(source, aside)
        self._fs.sync_dir(self._folder)
        return aside

    def _path(self, step: int) -> Path:
        return self._folder / f"step_{step:07d}"

    def _steps(self) -> list[int]:
        matches = (re.fullmatch(r"step_(\d{7,})", path.name) for path in self._folder.iterdir())
        return [int(match.group(1)) for match in matches if match]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint folder. Raises: CheckpointError naming the file and what is wrong with it."""
    name = shown(folder.name)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest["format"] > FORMAT:
            raise CheckpointError(f"{name}: format {manifest['format']} is newer than this program; upgrade rcmae")
        step, files, state = int(manifest["step"]), dict(manifest["files"]), manifest["state"]
        if _digest(step, files, state) != manifest["digest"]:
            raise CheckpointError(f"{name}/{MANIFEST}: does not match its own digest")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{name}/{MANIFEST}: missing or unreadable") from None
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if present != set(files):
        odd = shown(sorted(present ^ set(files))[0])
        raise CheckpointError(f"{name}/{odd}: {'missing' if odd in files else 'not listed in the manifest'}")
    return Checkpoint(
        step, {Path(n).stem: _read_file(folder / n, files[n]) for n in files}, state, manifest["digest"], manifest
    )


def _read_file(path: Path, expected: dict[str, Any]) -> dict[str, Tensor]:
    name = f"{shown(path.parent.name)}/{shown(path.name)}"
    try:
        data = path.read_bytes()  # hashed and parsed from the same bytes
    except OSError as error:
        raise CheckpointError(f"{name}: {error.strerror}") from None
    if len(data) != expected["size"]:
        raise CheckpointError(f"{name}: {len(data)} bytes, expected {expected['size']}")
    if hashlib.sha256(data).hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{name}: the checksum differs")
    try:
        return load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _digest(step: int, files: dict[str, Any], state: dict[str, Any]) -> str:
    identity = {"step": step, "files": {name: files[name]["sha256"] for name in sorted(files)}, "state": state}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _require_finite(tensors: Tensors) -> None:
    for stem, group in tensors.items():
        for name, tensor in group.items():
            # The sum is one fast pass; only if it is not finite is every element looked at.
            if tensor.is_floating_point() and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
                raise NumericError(f"{stem}: {name} holds non-finite values; the checkpoint is not written")
