"""`rcmae convert`: foreign checkpoints to backbone and detector directories, and a detector to detectron2's names."""

from pathlib import Path

from core.backbone_io import export_backbone, load_backbone, read_weights
from core.errors import CheckpointError, ConfigError, MachineError, shown
from core.foreign_keys import flat_state
from transfer.detection.coco_names import COCO, read_categories
from transfer.detection.detectron2_files import (
    detector_from_detectron2,
    detector_to_detectron2,
    is_detector,
    is_detectron2,
    refuse_pickle,
)


def convert_checkpoint(
    source: Path, out: Path, branch: str, num_heads: int | None, names_json: Path | None = None
) -> list[str]:
    """Load `source`, write it to `out`, and return the report.

    What it is follows from its names: a plain ViT becomes a backbone directory, detectron2's ViTDet a detector
    directory, a detector directory a file of detectron2's names.

    Raises: CheckpointError for what cannot be explained.
    """
    if branch not in {"teacher", "student"}:
        raise ConfigError(f"--branch {shown(branch)}: expected teacher or student")
    if out.exists():
        raise MachineError(f"{shown(out)}: exists already; give a new name")
    refuse_pickle(source)
    if is_detector(source):
        lines = detector_to_detectron2(source, out).lines()
    elif _holds_detectron2(source):
        state, _ = flat_state(read_weights(source), branch)
        categories = read_categories(names_json) if names_json else COCO
        lines = detector_from_detectron2(state, categories, out, shown(source)).lines()
    elif names_json:
        raise ConfigError("--names-json: has no effect; the source is no detector of detectron2")
    else:
        vit, report = load_backbone(source, branch=branch, num_heads=num_heads)
        export_backbone(out, vit, {"converted_from": shown(source.name), "layout": report.layout})
        lines = report.lines()
    return [*lines, f"written  {shown(out)}"]


def _holds_detectron2(source: Path) -> bool:
    """Whether a file holds a detector; one that cannot be read holds none, and `load_backbone` says why."""
    try:
        return source.is_file() and is_detectron2(flat_state(read_weights(source), "teacher")[0])
    except CheckpointError:
        return False
