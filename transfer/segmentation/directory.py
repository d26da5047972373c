"""A segmentor as a directory: `model.safetensors` under this suite's names, and `config.json`, its description."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core.backbone_io import WEIGHTS, fill, read_weights
from core.errors import shown
from core.files import FileSystem
from core.model_directory import read_description, require_kind, write_model
from core.vit import ViT, ViTConfig
from transfer.segmentation.classes import Classes
from transfer.segmentation.labels import LabelKeys, label_table
from transfer.segmentation.linear_head import LinearSegmentor, Network
from transfer.segmentation.segmentor import LabelsConfig, SegmentorConfig, build_segmentor
from transfer.segmentation.slide import InferenceConfig

KIND = "segmentor"
LABELS = ("ignore_index", "label_shift", "label_map")  # what is kept of `LabelKeys`; the rest is the classes
DESCRIBED = ("kind", "head", "vit", "segmentor", "names", "palette", "labels", "scale", "inference")

Head = Literal["upernet", "linear"]


@dataclass(frozen=True)
class LoadedSegmentor:
    """A segmentor as it was stored, with all that it takes to use it.

    Attributes:
        model: in evaluation mode.
        labels: what the stored values of the label files were that it was trained on; `classes` is not set.
        scale: (long, short) sides, in pixels, that images are resized to fit into.
        inference: how windows lie.
        provenance: where the weights come from.
    """

    model: Network
    head: Head
    classes: Classes
    labels: LabelKeys
    scale: tuple[int, int]
    inference: InferenceConfig
    provenance: dict[str, Any]


def export_segmentor(
    folder: Path,
    model: Network,
    classes: Classes,
    labels: LabelKeys,
    scale: tuple[int, int],
    inference: InferenceConfig,
    provenance: Mapping[str, Any],
    fs: FileSystem | None = None,
) -> None:
    """Write a segmentor directory, whole or not at all. Arguments: as the attributes of `LoadedSegmentor`."""
    head: Head = "linear" if isinstance(model, LinearSegmentor) else "upernet"
    description = {
        "kind": KIND,
        "head": head,
        "vit": model.backbone.config.model_dump(mode="json"),
        "segmentor": model.config.model_dump(mode="json"),
        "names": list(classes.names),
        "palette": [list(colour) for colour in classes.palette],
        "labels": labels.model_dump(mode="json", include=set(LABELS)),
        "scale": list(scale),
        "inference": inference.model_dump(mode="json"),
        **provenance,
    }
    write_model(folder, model, {"rcmae": description}, fs)


def load_segmentor(folder: Path) -> LoadedSegmentor:
    """Load a segmentor directory strictly.

    Raises: CheckpointError where something is missing, unknown, or of another shape; NumericError for weights that are
        not finite.
    """
    loaded = read_description(folder, KIND, "segment", _described)
    fill(loaded.model, read_weights(folder / WEIGHTS), shown(folder))
    return loaded


def _described(description: dict[str, Any]) -> LoadedSegmentor:
    """A segmentor as its description says, with weights yet to be loaded."""
    ours = description["rcmae"]
    require_kind(ours, KIND)
    head: Head = {"upernet": "upernet", "linear": "linear"}[ours["head"]]  # type: ignore[assignment]
    vit = ViT(ViTConfig.model_validate_json(json.dumps(ours["vit"])))
    sizes: type[LabelsConfig] = SegmentorConfig if head == "upernet" else LabelsConfig
    config = sizes.model_validate_json(json.dumps(ours["segmentor"]))
    classes = _classes(ours["names"], ours["palette"], config.num_classes)
    labels = LabelKeys.model_validate_json(json.dumps(ours["labels"] | {"num_classes": len(classes)}))
    label_table(labels, len(classes))
    model = build_segmentor(vit, config) if isinstance(config, SegmentorConfig) else LinearSegmentor(vit, config)
    return LoadedSegmentor(
        model.eval(),
        head,
        classes,
        labels,
        _scale(ours["scale"]),
        InferenceConfig.model_validate_json(json.dumps(ours["inference"])),
        {key: value for key, value in ours.items() if key not in DESCRIBED},
    )


def _classes(names: Any, palette: Any, num_classes: int) -> Classes:
    colours = tuple((int(red), int(green), int(blue)) for red, green, blue in palette)
    if not len(names) == len(colours) == num_classes:
        raise ValueError(f"{num_classes} classes, {len(names)} names, {len(colours)} colours")
    if any(not 0 <= value <= 255 for colour in colours for value in colour):
        raise ValueError("palette: expected colours of 0..255")
    return Classes(tuple(map(str, names)), colours)


def _scale(sides: Any) -> tuple[int, int]:
    long, short = map(int, sides)
    if not long >= short >= 1:
        raise ValueError(f"scale: expected (long, short) sides in pixels, got {long}, {short}")
    return long, short
