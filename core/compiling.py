"""torch.compile for transformer blocks: when it is used, and on what."""

import importlib.util
import logging
import shutil
from typing import Literal

import torch
from torch import nn

from core.errors import ConfigError
from core.task import Task
from core.vit import Block

Compile = Literal["auto", "on", "off"]

logger = logging.getLogger("rcmae")


def compiles(choice: Compile, device: torch.device) -> bool:
    """Whether blocks are compiled: auto does so on a GPU, if the machine can, and not on a CPU (docs/benchmarks.md).

    Raises: ConfigError for "on" where no compiler is found.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return False
    missing = _missing(device)
    if missing and choice == "on":
        raise ConfigError(f"engine.compile=on: {missing}; install it, or give engine.compile=off")
    if missing:
        logger.warning("engine.compile=auto: %s, so nothing is compiled; install it to train faster", missing)
    return not missing


def _missing(device: torch.device) -> str | None:
    if not any(shutil.which(name) for name in ("g++", "gcc", "clang++", "clang")):
        return "torch.compile needs a C++ compiler, and there is none"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton, which is not installed"
    return None


def compile_blocks(task: Task) -> bool:
    """Compile every block of the task's modules in place: the same code serves all blocks of a shape.

    Only `forward` is replaced: names of parameters stay, and what wraps a call (FSDP2) stays outside.

    Returns: whether there were any; networks of other frameworks have none.
    """
    found = [block for module in task.modules().values() for block in blocks(module)]
    for block in found:
        # Each shape is compiled for itself: whichever came first would otherwise decide how the others round.
        block.forward = torch.compile(block.forward, dynamic=False)
    return bool(found)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a network. Heads of a detector are none: their inputs change shape with every image."""
    return [child for child in module.modules() if isinstance(child, Block)]
