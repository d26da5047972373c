"""What a pretraining run costs before it runs: FLOPs, parameters, memory, disk. FLOPs follow spec section 7."""

from core.cost import (
    BF16_SHARE,
    block_flops,
    block_parameters,
    encoder_flops,
    encoder_parameters,
    held_values,
    patch_embed_flops,
)
from core.vit import ViTConfig
from pretrain.mae import DecoderConfig, num_kept


def forward_flops(vit: ViTConfig, decoder: DecoderConfig, mask_ratio: float) -> dict[str, int]:
    """FLOPs per image of one forward pass of the published implementation, by part (a multiply-add is 2).

    Norms, softmax, GELU and losses are not counted. The published work is the numerator of MFU whatever is saved.
    """
    L, K = vit.num_patches, num_kept(vit.num_patches, mask_ratio)
    return {
        "patch_embed": patch_embed_flops(vit),
        "encoder": encoder_flops(vit, K),
        "decoder_embed": 2 * (K + 1) * vit.embed_dim * decoder.embed_dim,
        "decoder": decoder.depth * block_flops(L + 1, decoder.embed_dim, vit.mlp_ratio),
        "decoder_pred": 2 * (L + 1) * decoder.embed_dim * vit.patch_values,
    }


def step_flops(vit: ViTConfig, decoder: DecoderConfig, mask_ratio: float, with_teacher: bool) -> int:
    """FLOPs per image of one training step: forward and backward of the student, forward of the teacher."""
    parts = forward_flops(vit, decoder, mask_ratio)
    forward = sum(parts.values())
    return (4 if with_teacher else 3) * forward - parts["patch_embed"]  # the image needs no gradient


def num_parameters(vit: ViTConfig, decoder: DecoderConfig) -> tuple[int, int]:
    """Trainable parameters of encoder and decoder."""
    width = decoder.embed_dim
    head = (vit.embed_dim + 1) * width + width + 2 * width + (width + 1) * vit.patch_values
    return encoder_parameters(vit), head + decoder.depth * block_parameters(width, vit.mlp_ratio)


def fixed_bytes(vit: ViTConfig, decoder: DecoderConfig, with_teacher: bool) -> int:
    """Memory that does not depend on the batch: weights, gradients, two moments, teacher, all float32."""
    return 4 * sum(num_parameters(vit, decoder)) * (5 if with_teacher else 4)


def activation_bytes(vit: ViTConfig, decoder: DecoderConfig, mask_ratio: float, bf16: bool) -> int:
    """About how much memory one image takes between forward and backward (`core.cost.held_values`)."""
    L, K = vit.num_patches, num_kept(vit.num_patches, mask_ratio)
    narrow = vit.model_copy(update={"embed_dim": decoder.embed_dim, "depth": decoder.depth})
    values = held_values(vit, K + 1) + held_values(narrow, L + 1)
    values += 4 * L * vit.patch_values  # images, patches, target, prediction
    return int(values * 4 * (BF16_SHARE if bf16 else 1.0))


def checkpoint_bytes(vit: ViTConfig, decoder: DecoderConfig, with_teacher: bool) -> int:
    """Disk space of one checkpoint: student, two moments, teacher, position tables."""
    tables = (vit.num_patches + 1) * (vit.embed_dim + decoder.embed_dim)
    return 4 * (sum(num_parameters(vit, decoder)) * (4 if with_teacher else 3) + 2 * tables)
