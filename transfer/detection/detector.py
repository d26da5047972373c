"""A detector as a directory: `model.safetensors` under this suite's names, and `config.json`, which says what it is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import save

from core.backbone_io import CONFIG, WEIGHTS, fill, read_weights
from core.errors import CheckpointError, shown
from core.files import FileSystem, replace_dir
from core.vit import ViT, ViTConfig
from transfer.detection.coco import Id
from transfer.detection.mask_rcnn import DetectorConfig, MaskRCNN, build_mask_rcnn

KIND = "detector"


@dataclass(frozen=True)
class LoadedDetector:
    """A detector as it was stored, with all that it takes to use it.

    Attributes:
        names: of the classes, in the order of the labels; category_ids: what its data set calls them.
        side: of the square that images are resized into, in pixels.
        provenance: where the weights come from.
    """

    model: MaskRCNN
    names: tuple[str, ...]
    category_ids: tuple[Id, ...]
    side: int
    provenance: dict[str, Any]


def export_detector(
    folder: Path,
    model: MaskRCNN,
    config: DetectorConfig,
    names: Sequence[str],
    category_ids: Sequence[Id],
    side: int,
    provenance: Mapping[str, Any],
    fs: FileSystem | None = None,
) -> None:
    """Write a detector directory, whole or not at all."""
    description = {
        "rcmae": {
            "kind": KIND,
            "vit": model.backbone.vit.config.model_dump(mode="json"),
            "detector": config.model_dump(mode="json"),
            "names": list(names),
            "category_ids": list(category_ids),
            "side": side,
            **provenance,
        }
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    replace_dir(folder, {WEIGHTS: save(state), CONFIG: json.dumps(description, indent=1).encode()}, fs)


def load_detector(folder: Path) -> LoadedDetector:
    """Load a detector directory strictly.

    Raises: CheckpointError where something is missing, unknown, or of another shape; NumericError for weights that are
        not finite.
    """
    name = shown(folder)
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{name}: no detector directory; expected {WEIGHTS} and {CONFIG}, as detect writes")
    try:
        ours = json.loads((folder / CONFIG).read_bytes())["rcmae"]
        if ours["kind"] != KIND:
            raise ValueError(f"it describes a {ours['kind']}")
        vit = ViTConfig.model_validate_json(json.dumps(ours["vit"]))
        config = DetectorConfig.model_validate_json(json.dumps(ours["detector"]))
        names, category_ids, side = tuple(map(str, ours["names"])), tuple(ours["category_ids"]), int(ours["side"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
        first = shown(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise CheckpointError(f"{shown(folder / CONFIG)}: not a detector's description: {first}") from None
    model = build_mask_rcnn(ViT(vit), config)
    fill(model, read_weights(folder / WEIGHTS), name)
    described = {"kind", "vit", "detector", "names", "category_ids", "side"}
    provenance = {key: value for key, value in ours.items() if key not in described}
    return LoadedDetector(model, names, category_ids, side, provenance)
