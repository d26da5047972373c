"""A detector as a directory: `model.safetensors` under this suite's names, and `config.json`, which says what it is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.backbone_io import WEIGHTS, fill, read_weights
from core.errors import DataError, shown
from core.files import FileSystem
from core.model_directory import read_description, require_kind, write_model
from core.vit import ViT, ViTConfig
from transfer.detection.coco import CocoSet, Id
from transfer.detection.mask_rcnn import DetectorConfig, MaskRCNN, build_mask_rcnn

KIND = "detector"


@dataclass(frozen=True)
class LoadedDetector:
    """A detector as it was stored, with all that it takes to use it.

    Attributes:
        config: its sizes and numbers beside those of the ViT.
        names: of the classes, in the order of the labels; category_ids: what its data set calls them.
        side: of the square that images are resized into, in pixels.
        provenance: where the weights come from.
    """

    model: MaskRCNN
    config: DetectorConfig
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
        "kind": KIND,
        "vit": model.backbone.vit.config.model_dump(mode="json"),
        "detector": config.model_dump(mode="json"),
        "names": list(names),
        "category_ids": list(category_ids),
        "side": side,
        **provenance,
    }
    write_model(folder, model, {"rcmae": description}, fs)


def load_detector(folder: Path) -> LoadedDetector:
    """Load a detector directory strictly.

    Raises: CheckpointError where something is missing, unknown, or of another shape; NumericError for weights that are
        not finite.
    """
    loaded = read_description(folder, KIND, "detect", _described)
    fill(loaded.model, read_weights(folder / WEIGHTS), shown(folder))
    return loaded


def require_categories(coco: CocoSet, loaded: LoadedDetector) -> None:
    """Raise DataError unless a set has the categories that a detector knows."""
    if coco.category_ids != loaded.category_ids:
        raise DataError(
            f"{shown(coco.origin)}: {len(coco.names)} categories, the detector knows {len(loaded.names)} "
            f"({', '.join(map(shown, loaded.names[:3]))} ...); their ids must be the same"
        )


def _described(description: dict[str, Any]) -> LoadedDetector:
    """A detector as its description says, with weights yet to be loaded."""
    ours = description["rcmae"]
    require_kind(ours, KIND)
    vit = ViTConfig.model_validate_json(json.dumps(ours["vit"]))
    config = DetectorConfig.model_validate_json(json.dumps(ours["detector"]))
    names, category_ids, side = tuple(map(str, ours["names"])), tuple(ours["category_ids"]), int(ours["side"])
    described = {"kind", "vit", "detector", "names", "category_ids", "side"}
    provenance = {key: value for key, value in ours.items() if key not in described}
    return LoadedDetector(build_mask_rcnn(ViT(vit), config), config, names, category_ids, side, provenance)
