"""`rcmae convert`: foreign checkpoints to directories of this suite, and those of detectors and segmentors back."""

from pathlib import Path

from core.backbone_io import export_backbone, load_backbone, read_weights
from core.errors import CheckpointError, ConfigError, MachineError, shown
from core.foreign_keys import State, flat_state
from core.model_directory import kind_of
from transfer.detection import detector
from transfer.detection.coco_names import COCO, read_categories
from transfer.detection.detectron2_files import (
    detector_from_detectron2,
    detector_to_detectron2,
    is_detectron2,
    refuse_pickle,
)
from transfer.segmentation import directory
from transfer.segmentation.mmseg_files import is_mmseg, segmentor_from_mmseg, segmentor_to_mmseg


def convert_checkpoint(
    source: Path,
    out: Path,
    branch: str,
    num_heads: int | None,
    names_json: Path | None = None,
    classes: str | None = None,
) -> list[str]:
    """Load `source`, write it to `out`, and return the report.

    What it is follows from its names: a plain ViT becomes a backbone directory, detectron2's ViTDet a detector
    directory, mmsegmentation's UperNet a segmentor directory, and a directory of either a file of their names.

    Raises: CheckpointError for what cannot be explained.
    """
    if branch not in {"teacher", "student"}:
        raise ConfigError(f"--branch {shown(branch)}: expected teacher or student")
    if out.exists():
        raise MachineError(f"{shown(out)}: exists already; give a new name")
    refuse_pickle(source)
    kind, state = kind_of(source), _foreign_state(source, branch)
    if names_json and not is_detectron2(state):
        raise ConfigError("--names-json: has no effect; the source is no detector of detectron2")
    if classes and not is_mmseg(state):
        raise ConfigError("--classes: has no effect; the source is no segmentor of mmsegmentation")
    if kind == detector.KIND:
        lines = detector_to_detectron2(source, out).lines()
    elif kind == directory.KIND:
        lines = segmentor_to_mmseg(source, out).lines()
    elif is_detectron2(state):
        categories = read_categories(names_json) if names_json else COCO
        lines = detector_from_detectron2(state, categories, out, shown(source)).lines()
    elif is_mmseg(state):
        lines = segmentor_from_mmseg(state, classes, num_heads, out, shown(source)).lines()
    else:
        vit, report = load_backbone(source, branch=branch, num_heads=num_heads)
        export_backbone(out, vit, {"converted_from": shown(source.name), "layout": report.layout})
        lines = report.lines()
    return [*lines, f"written  {shown(out)}"]


def _foreign_state(source: Path, branch: str) -> State:
    """The weights in a file; none of one that cannot be read, of which `load_backbone` says why."""
    try:
        return flat_state(read_weights(source), branch)[0] if source.is_file() else {}
    except CheckpointError:
        return {}
