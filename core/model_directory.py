"""A trained model as a directory: `model.safetensors` under this suite's names, and `config.json`, its description."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save
from torch import nn

from core.backbone_io import CONFIG, WEIGHTS
from core.errors import CheckpointError, shown
from core.files import FileSystem, replace_dir

Described = TypeVar("Described")


def write_model(folder: Path, model: nn.Module, description: Mapping[str, Any], fs: FileSystem | None = None) -> None:
    """Write a model directory, whole or not at all.

    Args:
        description: JSON values, all that it takes to build the model again and to use it.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    replace_dir(folder, {WEIGHTS: save(state), CONFIG: json.dumps(description, indent=1).encode()}, fs)


def read_description(
    folder: Path, kind: str, written_by: str, read: Callable[[dict[str, Any]], Described]
) -> Described:
    """What `read` makes of the description of a model directory.

    Args:
        kind: what the directory must hold, in a word; written_by: the verb that writes such ones.
        read: may raise what wrong values make it raise; see `require_kind`.
    Raises: CheckpointError for no such directory, or a description that `read` cannot make anything of.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{shown(folder)}: no {kind} directory; expected {WEIGHTS} and {CONFIG}, as {written_by} writes"
        )
    try:
        return read(json.loads((folder / CONFIG).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        first = shown(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise CheckpointError(f"{shown(folder / CONFIG)}: not a {kind}'s description: {first}") from None


def require_kind(ours: Mapping[str, Any], kind: str) -> None:
    """Raise ValueError unless the part of a description that is this suite's own says that it is of this kind."""
    if ours["kind"] != kind:
        raise ValueError(f"it describes a {ours['kind']}")


def kind_of(folder: Path) -> str | None:
    """What a folder says that it holds, such as "detector" or "segmentor"; None where it says nothing."""
    try:
        kind = json.loads((folder / CONFIG).read_bytes())["rcmae"]["kind"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return kind if isinstance(kind, str) else None
