"""Stored results of reference implementations: read, unpacked, one line where a file is missing or broken."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import DataError, shown

Golden = dict[str, Tensor]
FOLDER = Path(__file__).with_name("golden")


def read_golden(folder: Path, stem: str) -> tuple[Golden, dict[str, Any]]:
    """Tensors of a file (float16 as float32, which is lossless) and what it says of itself.

    Raises: DataError if it is missing or no safetensors file.
    """
    path = folder / f"{stem}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  a file, not a dictionary
            meta = json.loads(file.metadata()["golden"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from None
    return {key: t.float() if t.dtype == torch.float16 else t for key, t in tensors.items()}, meta


def read_json(folder: Path, stem: str) -> Any:
    """What a JSON file holds. Raises: DataError if it is missing or no JSON."""
    path = folder / f"{stem}.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def part(golden: Golden, prefix: str) -> Golden:
    """The tensors whose names begin so, by the rest of their names."""
    return {key.removeprefix(prefix): tensor for key, tensor in golden.items() if key.startswith(prefix)}


def unpacked(packed: Tensor, height: int, width: int) -> Tensor:
    """Masks [N, height, width] bool from the bits of each."""
    bits = np.unpackbits(packed.numpy(), axis=1)[:, : height * width]
    return torch.from_numpy(bits.reshape(-1, height, width)).bool()


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = f"broken: {shown(str(error))}" if path.is_file() else "missing"
    return DataError(f"{shown(path)}: reference results are {reason}; install rcmae again")
