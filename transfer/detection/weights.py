"""detectron2's ViTDet weights under this suite's names, and back. Spec detection 7.1.

A name is a prefix from the table below and a leaf (weight, bias, a table) that stays. Nothing else is done to a tensor.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from core.errors import CheckpointError, shown
from core.vit import ViTConfig
from transfer.detection.cascade import NUM_STAGES
from transfer.detection.mask_rcnn import DetectorConfig
from transfer.detection.roi_heads import ROIHeadsConfig
from transfer.detection.rpn import RPNConfig

State = dict[str, Tensor]
MAX_CONVS = 16  # of one head
_PYRAMID = {  # detectron2 counts the layers of a level, which are not the same on all
    "simfp_2": ("p2", ("up1", "up_norm", "", "up2", "reduce", "smooth")),
    "simfp_3": ("p3", ("up1", "reduce", "smooth")),
    "simfp_4": ("p4", ("reduce", "smooth")),
    "simfp_5": ("p5", ("", "reduce", "smooth")),
}
_ONE_RPN_CONV = "proposal_generator.rpn_head.conv."  # a single convolution has no number there
_NO_WEIGHTS = re.compile(r"pixel_(mean|std)|proposal_generator\.anchor_generator\..*")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did with every tensor.

    Attributes:
        mapped: new name by old name.
        ignored: tensors that are no weights: detectron2's mean, deviation and anchors.
    """

    mapped: dict[str, str]
    ignored: tuple[str, ...]

    def lines(self) -> list[str]:
        """For a log: every renaming, and what was left out."""
        return [
            *(f"{shown(old)} -> {shown(new)}" for old, new in self.mapped.items()),
            *(f"ignored  {shown(name)}" for name in self.ignored),
        ]


def from_detectron2(state: Mapping[str, Tensor]) -> tuple[State, ConversionReport]:
    """The state dict of a detectron2 ViTDet model as one of `MaskRCNN`.

    Raises: CheckpointError if a name is unknown; nothing is dropped in silence.
    """
    ignored = tuple(name for name in state if _NO_WEIGHTS.fullmatch(name))
    names = _renamed([name for name in state if name not in ignored], dict(_prefixes()))
    return {names[old]: tensor for old, tensor in state.items() if old in names}, ConversionReport(names, ignored)


def to_detectron2(state: Mapping[str, Tensor]) -> tuple[State, ConversionReport]:
    """The state dict of a `MaskRCNN` as detectron2 names it. Raises: CheckpointError if a name is unknown."""
    prefixes = {ours: theirs for theirs, ours in _prefixes()}
    if "rpn.head.convs.1.weight" not in state:
        prefixes["rpn.head.convs.0."] = _ONE_RPN_CONV
    names = _renamed(list(state), prefixes)
    return {names[old]: tensor for old, tensor in state.items()}, ConversionReport(names, ())


def sizes_of(state: Mapping[str, Tensor]) -> tuple[ViTConfig, DetectorConfig]:
    """The sizes of the ViT and of the detector that a state dict of `MaskRCNN` belongs to.

    What leaves no trace in the weights (thresholds, numbers of samples) has its default. Blocks whose relative
    positions reach less far than those of others attend in windows.

    Raises: CheckpointError if it is no such state dict.
    """
    try:
        return _vit_config(state), _detector_config(state)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"no weights of a Mask R-CNN on a ViT: {shown(str(error))}") from None


def _prefixes() -> Iterator[tuple[str, str]]:
    """detectron2's prefix and ours."""
    yield "backbone.net.", "backbone.vit."
    for theirs, (level, layers) in _PYRAMID.items():
        for index, layer in enumerate(layers):
            if layer:
                yield f"backbone.{theirs}.{index}.", f"backbone.pyramid.{level}.{layer}."
            if layer in {"reduce", "smooth"}:
                yield f"backbone.{theirs}.{index}.norm.", f"backbone.pyramid.{level}.{layer}_norm."
    yield "proposal_generator.rpn_head.objectness_logits.", "rpn.head.objectness."
    yield "proposal_generator.rpn_head.anchor_deltas.", "rpn.head.deltas."
    yield _ONE_RPN_CONV, "rpn.head.convs.0."
    for k in range(MAX_CONVS):
        yield f"proposal_generator.rpn_head.conv.conv{k}.", f"rpn.head.convs.{k}."
        yield f"roi_heads.mask_head.mask_fcn{k + 1}.", f"roi.mask.convs.{k}."
    yield "roi_heads.mask_head.deconv.", "roi.mask.upsample."
    yield "roi_heads.mask_head.predictor.", "roi.mask.predictor."
    for theirs, ours in (("", "box"), *((f"{stage}.", f"stages.{stage}") for stage in range(NUM_STAGES))):
        for k in range(MAX_CONVS):
            yield f"roi_heads.box_head.{theirs}conv{k + 1}.", f"roi.{ours}.convs.{k}."
        yield f"roi_heads.box_head.{theirs}fc1.", f"roi.{ours}.fc."
        yield f"roi_heads.box_predictor.{theirs}cls_score.", f"roi.{ours}.cls."
        yield f"roi_heads.box_predictor.{theirs}bbox_pred.", f"roi.{ours}.reg."


def _renamed(names: list[str], prefixes: Mapping[str, str]) -> dict[str, str]:
    """New name by old one. The longest prefix counts."""
    ordered = sorted(prefixes, key=len, reverse=True)
    by_old = {name: next((prefix for prefix in ordered if name.startswith(prefix)), None) for name in names}
    unknown = [name for name, prefix in by_old.items() if prefix is None]
    if unknown:
        more = f" and {len(unknown) - 6} more" if len(unknown) > 6 else ""
        raise CheckpointError(f"no place for {', '.join(map(shown, unknown[:6]))}{more}; expected a ViTDet Mask R-CNN")
    return {name: prefixes[prefix] + name.removeprefix(prefix) for name, prefix in by_old.items() if prefix}


def _vit_config(state: Mapping[str, Tensor]) -> ViTConfig:
    dim, in_chans, patch_size, _ = state["backbone.vit.patch_embed.proj.weight"].shape
    rows = state["backbone.vit.pos_embed"].shape[1]
    side = math.isqrt(rows - 1)
    if side**2 != rows - 1:
        raise ValueError(f"backbone.vit.pos_embed has {rows} rows, expected one and a square grid")
    depth = _count(state, r"backbone\.vit\.blocks\.(\d+)\.norm1\.weight")
    tables = [state[f"backbone.vit.blocks.{i}.attn.rel_pos_{axis}"] for axis in "hw" for i in range(depth)]
    reach = [((len(h) + 1) // 2, (len(w) + 1) // 2) for h, w in zip(tables[:depth], tables[depth:], strict=True)]
    smallest, largest = min(reach), max(reach)
    windowed = smallest != largest
    return ViTConfig(
        img_size=(side * patch_size, side * patch_size),
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=dim,
        depth=depth,
        num_heads=dim // tables[0].shape[1],
        mlp_ratio=len(state["backbone.vit.blocks.0.mlp.fc1.bias"]) / dim,
        class_token=False,
        window_size=smallest[0] if windowed else None,
        global_blocks=tuple(i for i, size in enumerate(reach) if size == largest) if windowed else (),
        rel_pos_grid=largest,
    )


def _detector_config(state: Mapping[str, Tensor]) -> DetectorConfig:
    cascade = "roi.stages.0.fc.weight" in state
    box = "roi.stages.0" if cascade else "roi.box"
    return DetectorConfig(
        num_classes=len(state[f"{box}.cls.bias"]) - 1,
        cascade=cascade,
        channels=len(state["backbone.pyramid.p4.smooth.weight"]),
        rpn=RPNConfig(num_convs=_count(state, r"rpn\.head\.convs\.(\d+)\.weight")),
        roi=ROIHeadsConfig(
            num_box_convs=_count(state, re.escape(box) + r"\.convs\.(\d+)\.weight"),
            box_fc_dim=len(state[f"{box}.fc.bias"]),
            num_mask_convs=_count(state, r"roi\.mask\.convs\.(\d+)\.weight"),
        ),
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.fullmatch(pattern, name))})
