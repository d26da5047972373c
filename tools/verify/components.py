"""All components in the order of the table: what each is compared with, and by what."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.verify import (
    classification,
    coco,
    detection_backbone,
    detection_boxes,
    detection_data,
    detection_heads,
    detection_model,
    parameter_groups,
    pretraining,
    robustness,
    segmentation_data,
    segmentation_model,
    segmentation_parts,
)
from tools.verify.measure import Measure

Check = Callable[[Path], Iterator[Measure]]  # of the folder with the golden files

MAE, RC_MAE = "MAE's code", "RC-MAE's code"  # the official ones
TIMM, PYCOCOTOOLS, CORRUPTIONS = "timm", "pycocotools", "imagecorruptions"
DETECTRON2, MMSEG = "detectron2", "mmsegmentation"
# The version that stored results are of.
STORED = {DETECTRON2: "0.6", MMSEG: "1.2.2", CORRUPTIONS: "1.1.2"}


@dataclass(frozen=True)
class Component:
    """A part of the suite that has a reference.

    Attributes:
        name: of the part.
        against: the package that it is compared with, or whose numbers.
        stored: comparisons with stored results; None where the package is always installed.
        live: comparisons with the package itself; None where there are none.
    """

    name: str
    against: str
    stored: Check | None = None
    live: Check | None = None


def _here(measures: Callable[[], Iterator[Measure]]) -> Check:
    """Comparisons that need no golden file."""
    return lambda folder: measures()


def _live(module: str, name: str, **arguments: str) -> Check:
    """Comparisons of a module that imports a package which may be absent."""

    def check(folder: Path) -> Iterator[Measure]:
        return getattr(importlib.import_module(f"tools.verify.{module}"), name)(folder, **arguments)

    return check


def _detectron2(name: str, **arguments: str) -> Check:
    return _live("live_detectron2", name, **arguments)


def _detectron2_data(name: str) -> Check:
    return _live("live_detectron2_data", name)


def _mmseg(name: str) -> Check:
    return _live("live_mmseg", name)


def _whole(name: str, stored: Callable[..., Iterator[Measure]]) -> list[Component]:
    """A component of both kinds of detector."""
    kinds = {"mask_rcnn": "Mask R-CNN", "cascade": "Cascade"}
    return [
        Component(f"{name}, {text}", DETECTRON2, partial(stored, kind=kind), _detectron2(name, kind=kind))
        for kind, text in kinds.items()
    ]


PRETRAINING: tuple[Component, ...] = (
    Component("RC-MAE step", RC_MAE, _here(pretraining.step)),
    Component("pretraining schedules", RC_MAE, pretraining.schedules),
    Component("position tables", MAE, pretraining.positions),
    Component("ViT", TIMM, live=_here(pretraining.against_timm)),
)
CLASSIFICATION: tuple[Component, ...] = (
    Component("classifier", TIMM, live=_here(classification.classifier_of_timm)),
    Component("RandAugment's operations", TIMM, live=_here(classification.operations_of_timm)),
    Component("layer decay of classifiers", MAE, parameter_groups.classifier_groups),
    Component("schedules of classifiers", MAE, _here(classification.schedules)),
    Component("LARS", MAE, _here(classification.lars)),
    Component("k-NN", "by hand", _here(classification.knn)),
)
DETECTION: tuple[Component, ...] = (
    Component("ViT with windows", DETECTRON2, detection_backbone.windowed_vit, _detectron2("windowed_vit")),
    Component("feature pyramid", DETECTRON2, detection_backbone.pyramid, _detectron2("pyramid")),
    Component("anchors", DETECTRON2, detection_boxes.anchors, _detectron2("anchors")),
    Component("box coder", DETECTRON2, detection_boxes.box_coder, _detectron2("box_coder")),
    Component("matching and sampling", DETECTRON2, detection_boxes.matching, _detectron2("matching")),
    Component("RPN", DETECTRON2, detection_backbone.rpn, _detectron2("rpn")),
    Component("ROI pooling", DETECTRON2, detection_boxes.pooling, _detectron2("pooling")),
    Component("ROI heads", DETECTRON2, detection_heads.roi_heads, _detectron2("roi_heads")),
    Component("stages of a cascade", DETECTRON2, detection_heads.relabelled),
    Component("mask targets", DETECTRON2, detection_heads.mask_targets, _detectron2("mask_targets")),
    *_whole("losses", detection_model.losses),
    *_whole("inference", detection_model.inference),
    Component("choice of detections", DETECTRON2, detection_heads.selection, _detectron2_data("selection")),
    Component("pasted masks", DETECTRON2, detection_heads.pasting, _detectron2_data("pasting")),
    Component("large-scale jitter", DETECTRON2, detection_data.jittered, _detectron2_data("jittered")),
    Component("resizes of detection", DETECTRON2, detection_data.resizes, _detectron2_data("resizes")),
    Component("layer decay of detectors", DETECTRON2, parameter_groups.detector_groups, _detectron2_data("groups")),
    Component("schedules of detection", DETECTRON2, detection_data.schedules, _detectron2_data("schedules")),
    Component("COCO results", DETECTRON2, coco.toy_results),
    Component("COCO scores", PYCOCOTOOLS, live=_here(coco.against_pycocotools)),
)
SEGMENTATION: tuple[Component, ...] = (
    Component("neck", MMSEG, segmentation_parts.neck, _mmseg("neck")),
    Component("heads of UperNet", MMSEG, segmentation_parts.heads, _mmseg("heads")),
    Component("losses of UperNet", MMSEG, segmentation_parts.losses, _mmseg("losses")),
    Component("training of UperNet", MMSEG, segmentation_model.training, _mmseg("training")),
    Component("sliding window", MMSEG, segmentation_model.sliding_window, _mmseg("sliding_window")),
    Component("mean IoU", MMSEG, segmentation_parts.metric, _mmseg("metric")),
    Component("augmentation", MMSEG, segmentation_data.augmentation, _mmseg("augmentation")),
    Component("layer decay of segmentors", MMSEG, parameter_groups.segmentor_groups, _mmseg("groups")),
    Component("schedules of segmentation", MMSEG, segmentation_data.schedules),
)
ROBUSTNESS: tuple[Component, ...] = tuple(
    Component(
        f"corruptions, {group}",
        CORRUPTIONS,
        partial(robustness.corruptions, names=names),
        partial(robustness.live_corruptions, names=names),
    )
    for group, names in robustness.GROUPS.items()
)
COMPONENTS = PRETRAINING + CLASSIFICATION + DETECTION + SEGMENTATION + ROBUSTNESS
