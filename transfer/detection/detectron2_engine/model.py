"""detectron2's ViTDet with the sizes and numbers of a detector of this suite. Spec detection 2 to 4.

Configured in code: the published configurations are files of detectron2's repository and not of the installed package.
"""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN, SimpleFeaturePyramid
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.vit import ViT as Detectron2ViT
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from torch import Tensor, nn

from core.errors import ConfigError
from core.transforms import IMAGENET_MEAN, IMAGENET_STD
from core.vit import LAYER_NORM_EPS, ViTConfig
from transfer.detection.cascade import CODERS, THRESHOLDS
from transfer.detection.mask_rcnn import DetectorConfig
from transfer.detection.pyramid import strides_of
from transfer.detection.roi_heads import BOX_POOLED_SIZE, FIRST_CODER, FIRST_THRESHOLD, MASK_POOLED_SIZE, ROIHeadsConfig
from transfer.detection.rpn import BOX_CODER, MATCHER
from transfer.detection.weights import to_detectron2

PATCH_SIZE = 16  # of ViTDet; its pyramid is named by strides, and the levels of regions are made for these
LEVELS = ("p2", "p3", "p4", "p5", "p6")
PYRAMID_SCALES = (4.0, 2.0, 1.0, 0.5)  # p2 to p5 of the ViT's map


def build_detectron2(
    vit: ViTConfig, config: DetectorConfig, side: int, drop_path: float, weights: Mapping[str, Tensor]
) -> GeneralizedRCNN:
    """A detector of detectron2 with the weights of one of this suite.

    Args:
        vit: of the detector, with windows and relative positions.
        side: of the square that images are padded to, in pixels.
        drop_path: of the last block, in training.
        weights: the state dict of a `MaskRCNN` of these sizes; loaded strictly.
    Raises: ConfigError for a ViT that detectron2's cannot be.
    """
    rows, columns = vit.grid
    if vit.patch_size != PATCH_SIZE or rows != columns:
        raise ConfigError(
            f"framework=detectron2: patches of {vit.patch_size} px and positions of {rows}x{columns}, its ViTDet has "
            f"patches of {PATCH_SIZE} px and square positions; patch_size={PATCH_SIZE} resamples patches"
        )
    strides = strides_of(vit.patch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it imports timm by an old name
        model = GeneralizedRCNN(
            backbone=_backbone(vit, config.channels, side, drop_path),
            proposal_generator=_rpn(config, strides),
            roi_heads=_roi_heads(config, strides),
            pixel_mean=[255 * value for value in IMAGENET_MEAN],
            pixel_std=[255 * value for value in IMAGENET_STD],
            input_format="RGB",
        )
    model.load_state_dict(to_detectron2(weights)[0])
    return model


def _backbone(vit: ViTConfig, channels: int, side: int, drop_path: float) -> SimpleFeaturePyramid:
    windowed = [i for i in range(vit.depth) if vit.window_of(i)]
    net = Detectron2ViT(
        img_size=side,
        patch_size=vit.patch_size,
        in_chans=vit.in_chans,
        embed_dim=vit.embed_dim,
        depth=vit.depth,
        num_heads=vit.num_heads,
        mlp_ratio=vit.mlp_ratio,
        drop_path_rate=drop_path,
        norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
        use_rel_pos=vit.rel_pos_grid is not None,
        window_size=vit.window_size or 0,
        window_block_indexes=windowed,
        pretrain_img_size=vit.img_size[0],
    )
    return SimpleFeaturePyramid(
        net, "last_feat", channels, PYRAMID_SCALES, top_block=LastLevelMaxPool(), norm="LN", square_pad=side
    )


def _rpn(config: DetectorConfig, strides: Sequence[int]) -> RPN:
    rpn = config.rpn
    return RPN(
        in_features=LEVELS,
        head=StandardRPNHead(
            in_channels=config.channels, num_anchors=len(rpn.aspect_ratios), conv_dims=[-1] * rpn.num_convs
        ),
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[rpn.anchor_scale * stride] for stride in strides],
            aspect_ratios=list(rpn.aspect_ratios),
            strides=list(strides),
            offset=0.0,
        ),
        anchor_matcher=Matcher(
            list(MATCHER.thresholds), list(MATCHER.labels), allow_low_quality_matches=MATCHER.allow_low_quality_matches
        ),
        box2box_transform=Box2BoxTransform(weights=BOX_CODER.weights),
        batch_size_per_image=rpn.batch_size_per_image,
        positive_fraction=rpn.positive_fraction,
        pre_nms_topk=(rpn.pre_nms_topk_train, rpn.pre_nms_topk_test),
        post_nms_topk=(rpn.post_nms_topk_train, rpn.post_nms_topk_test),
        nms_thresh=rpn.nms_threshold,
    )


def _roi_heads(config: DetectorConfig, strides: Sequence[int]) -> StandardROIHeads:
    roi, channels = config.roi, config.channels
    shared = {
        "num_classes": config.num_classes,
        "batch_size_per_image": roi.batch_size_per_image,
        "positive_fraction": roi.positive_fraction,
        "box_in_features": LEVELS[:-1],
        "box_pooler": _pooler(strides, BOX_POOLED_SIZE),
        "mask_in_features": LEVELS[:-1],
        "mask_pooler": _pooler(strides, MASK_POOLED_SIZE),
        "mask_head": MaskRCNNConvUpsampleHead(
            ShapeSpec(channels=channels, height=MASK_POOLED_SIZE, width=MASK_POOLED_SIZE),
            num_classes=config.num_classes,
            conv_dims=[channels] * (roi.num_mask_convs + 1),
            conv_norm="LN",
        ),
    }
    if not config.cascade:
        return StandardROIHeads(
            proposal_matcher=_matcher(FIRST_THRESHOLD),
            box_head=_box_head(channels, roi),
            box_predictor=_box_predictor(config, FIRST_CODER.weights),
            **shared,
        )
    return CascadeROIHeads(
        proposal_matchers=[_matcher(threshold) for threshold in THRESHOLDS],
        box_heads=[_box_head(channels, roi) for _ in CODERS],
        box_predictors=[_box_predictor(config, coder.weights) for coder in CODERS],
        **shared,
    )


def _matcher(threshold: float) -> Matcher:
    return Matcher([threshold], [0, 1], allow_low_quality_matches=False)


def _pooler(strides: Sequence[int], output_size: int) -> ROIPooler:
    scales = [1 / stride for stride in strides[:-1]]
    return ROIPooler(output_size, scales=scales, sampling_ratio=0, pooler_type="ROIAlignV2")


def _box_head(channels: int, roi: ROIHeadsConfig) -> FastRCNNConvFCHead:
    return FastRCNNConvFCHead(
        ShapeSpec(channels=channels, height=BOX_POOLED_SIZE, width=BOX_POOLED_SIZE),
        conv_dims=[channels] * roi.num_box_convs,
        fc_dims=[roi.box_fc_dim],
        conv_norm="LN",
    )


def _box_predictor(config: DetectorConfig, weights: Any) -> FastRCNNOutputLayers:
    return FastRCNNOutputLayers(
        ShapeSpec(channels=config.roi.box_fc_dim),
        box2box_transform=Box2BoxTransform(weights=weights),
        num_classes=config.num_classes,
        test_score_thresh=config.roi.score_threshold,
        test_nms_thresh=config.roi.nms_threshold,
        test_topk_per_image=config.roi.detections_per_image,
        cls_agnostic_bbox_reg=config.cascade,
    )
