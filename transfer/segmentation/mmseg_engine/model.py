"""mmsegmentation's EncoderDecoder for a recipe, and weights on their way there and back.

`operators.stand_in` comes before this module is imported.
"""

import warnings
from collections.abc import Mapping

from mmengine import ConfigDict
from mmseg.models import EncoderDecoder, SegDataPreProcessor
from torch import Tensor

from core.transforms import IMAGENET_MEAN, IMAGENET_STD
from core.vit import LAYER_NORM_EPS, ViTConfig
from transfer.segmentation.necks import NUM_LEVELS
from transfer.segmentation.segmentor import AUX_LEVEL, Segmentor
from transfer.segmentation.slide import InferenceConfig
from transfer.segmentation.weights import from_mmseg, to_mmseg

BATCH_NORM = {"type": "BN", "requires_grad": True}  # its SyncBN, on one process


def mmseg_segmentor(native: Segmentor, inference: InferenceConfig, drop_path: float = 0.0) -> EncoderDecoder:
    """The framework's network of the sizes of one of ours, with its weights, loaded strictly.

    Of a ViT without relative position bias, or without layer scale, the backbone's tables of zeros, or factors of one,
    are not trained: that is the same network.

    Args:
        inference: windows of the size that the ViT is made for.
        drop_path: greatest rate of the backbone's blocks, in training.
    """
    vit, sizes = native.backbone.config, native.config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on defaults that are published so
        model = EncoderDecoder(
            data_preprocessor=_preprocessor(vit, sizes.ignore_index),
            backbone=_backbone(vit, native.blocks, drop_path),
            neck={
                "type": "Feature2Pyramid",
                "embed_dim": vit.embed_dim,
                "rescales": [4, 2, 1, 0.5],
                "norm_cfg": BATCH_NORM,
            },
            decode_head={
                "type": "UPerHead",
                "in_channels": [vit.embed_dim] * NUM_LEVELS,
                "in_index": list(range(NUM_LEVELS)),
                "pool_scales": sizes.pool_scales,
                "channels": sizes.channels or vit.embed_dim,
                **_head(native, 1.0),
            },
            auxiliary_head={
                "type": "FCNHead",
                "in_channels": vit.embed_dim,
                "in_index": AUX_LEVEL,
                "channels": sizes.aux_channels,
                "num_convs": 1,
                "concat_input": False,
                **_head(native, sizes.aux_weight),
            },
            train_cfg={},
            test_cfg=ConfigDict(
                mode=inference.mode,
                crop_size=(inference.crop, inference.crop),
                stride=(inference.stride, inference.stride),
            ),
        )
    for name, parameter in model.named_parameters():
        table, factor = name.endswith("relative_position_bias_table"), ".gamma_" in name
        parameter.requires_grad_(not ((table and not vit.rel_pos_bias) or (factor and not vit.layer_scale)))
    load_native(model, native.state_dict(), vit)
    model.is_init = True  # or a Runner would draw them
    return model


def _preprocessor(vit: ViTConfig, ignore_index: int) -> SegDataPreProcessor:
    return SegDataPreProcessor(
        mean=[255 * value for value in IMAGENET_MEAN],
        std=[255 * value for value in IMAGENET_STD],
        size=vit.img_size,
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=ignore_index,
        test_cfg={"size": vit.img_size} if vit.rel_pos_bias else None,  # else too small images are refused: `Windows`
    )


def _backbone(vit: ViTConfig, blocks: tuple[int, ...], drop_path: float) -> dict:
    return {
        "type": "MAE",
        "img_size": vit.img_size,
        "patch_size": vit.patch_size,
        "in_channels": vit.in_chans,
        "embed_dims": vit.embed_dim,
        "num_layers": vit.depth,
        "num_heads": vit.num_heads,
        "mlp_ratio": int(vit.mlp_ratio),
        "out_indices": list(blocks),
        "attn_drop_rate": 0.0,
        "drop_path_rate": drop_path,
        "norm_cfg": {"type": "LN", "eps": LAYER_NORM_EPS},
        "act_cfg": {"type": "GELU"},
        "norm_eval": False,
        "init_values": 1.0,
    }


def _head(native: Segmentor, weight: float) -> dict:
    sizes = native.config
    return {
        "num_classes": sizes.num_classes,
        "dropout_ratio": sizes.dropout_ratio,
        "norm_cfg": BATCH_NORM,
        "align_corners": False,
        "ignore_index": sizes.ignore_index,
        "loss_decode": {
            "type": "CrossEntropyLoss",
            "use_sigmoid": False,
            "loss_weight": weight,
            "avg_non_ignore": sizes.average == "valid_pixels",
        },
    }


def load_native(model: EncoderDecoder, state: Mapping[str, Tensor], vit: ViTConfig) -> None:
    """Load the state dict of a `Segmentor` into the framework's network, strictly."""
    model.load_state_dict(to_mmseg(state, vit)[0], strict=True)


def native_state(model: EncoderDecoder) -> dict[str, Tensor]:
    """The state dict of a `Segmentor` with the weights of the framework's network."""
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return from_mmseg({name: tensor for name, tensor in model.state_dict().items() if name not in fixed})[0]


def native_names(model: EncoderDecoder) -> dict[str, str]:
    """What a `Segmentor` calls the parameters that are trained, by the framework's names."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return from_mmseg(trained)[1].mapped
