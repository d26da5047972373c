"""The machine that a run is on: device, memory, versions, commit, and the global random generators."""

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.errors import ConfigError, shown


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of a `device=` value, for one of the processes of this machine; a GPU becomes the current one.

    Raises: ConfigError for cuda where there is none, or fewer than processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has no usable GPU; give device=cpu or device=auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"--nproc: this machine has {torch.cuda.device_count()} GPUs, one is needed per process; give fewer, or "
            "device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def available_bytes(device: torch.device) -> int:
    """Memory that may still be taken: free memory of the GPU, or available memory of the whole machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 8 * 2**30


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of mallopt(3)


def keep_freed_memory(keep: bool = True) -> None:
    """Have glibc keep memory that was freed, since the next training step asks for the same again.

    Otherwise large tensors are mapped, zeroed page by page and unmapped in each step: 9 % of a ViT-S step on 2 cores
    (docs/benchmarks.md). The peak stays the same. Elsewhere than with glibc nothing changes.

    Args:
        keep: False goes back to the limits that glibc itself moves to once tensors were freed.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most that it takes
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1 if keep else 64 * 2**20)
    libc.mallopt(_M_MMAP_MAX, 0 if keep else 65536)


def seed_everything(seed: int) -> None:
    """Seed the global generators, which nothing should draw from: `global_rng_digest` tells if something did."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def global_rng_digest() -> str:
    """A short digest of the global generators' states: compared on resume, as a tripwire."""
    states = (
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tobytes(),
        torch.get_rng_state().numpy().tobytes(),
    )
    return hashlib.sha256(repr(states).encode()).hexdigest()[:12]


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process: of the GPU where there is one, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def environment() -> dict[str, Any]:
    """What a figure must be read with: command, versions, machine, commit."""
    packages = ("torch", "torchvision", "numpy", "pillow", "safetensors", "timm")
    return {
        "command": [shown(arg) for arg in sys.argv],
        "started": time.strftime("%F %T %z"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git_commit": git_commit(),
    }


def code_digest() -> str:
    """A short digest of this program's own source: what processes of one run must have in common."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in ("core", "pretrain", "transfer", "robustness", "tools"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def git_commit() -> str | None:
    """The commit of this clone, with `+` if tracked files differ from it; None outside a clone."""
    root = Path(__file__).resolve().parent.parent
    try:
        head, changes = (
            subprocess.run(  # noqa: S603  fixed arguments, no shell
                ["git", "-C", str(root), *args],  # noqa: S607
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.strip() + ("+" if changes.strip() else "")
