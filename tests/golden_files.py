"""Reads the reference results in ../shared/golden."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

Golden = dict[str, Tensor]


def read_golden(shared: Path, stem: str) -> tuple[Golden, dict[str, Any]]:
    """Tensors of a file (float16 as float32) and its metadata."""
    with safe_open(shared / "golden" / f"{stem}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  a file, not a dictionary
        meta = json.loads(file.metadata()["golden"])
    return {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}, meta


def part(golden: Golden, prefix: str) -> Golden:
    return {key.removeprefix(prefix): tensor for key, tensor in golden.items() if key.startswith(prefix)}
