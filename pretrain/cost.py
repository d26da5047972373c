"""What a pretraining run costs before it runs: FLOPs, parameters, memory, disk. FLOPs follow spec section 7."""

from core.vit import ViTConfig
from pretrain.mae import DecoderConfig, num_kept


def forward_flops(vit: ViTConfig, decoder: DecoderConfig, mask_ratio: float) -> dict[str, int]:
    """FLOPs per image of one forward pass of the published implementation, by part (a multiply-add is 2).

    Norms, softmax, GELU and losses are not counted. The published work is the numerator of MFU whatever is saved.
    """
    L, K = vit.num_patches, num_kept(vit.num_patches, mask_ratio)
    return {
        "patch_embed": 2 * L * vit.patch_values * vit.embed_dim,
        "encoder": vit.depth * _block_flops(K + 1, vit.embed_dim, vit.mlp_ratio),
        "decoder_embed": 2 * (K + 1) * vit.embed_dim * decoder.embed_dim,
        "decoder": decoder.depth * _block_flops(L + 1, decoder.embed_dim, vit.mlp_ratio),
        "decoder_pred": 2 * (L + 1) * decoder.embed_dim * vit.patch_values,
    }


def step_flops(vit: ViTConfig, decoder: DecoderConfig, mask_ratio: float, with_teacher: bool) -> int:
    """FLOPs per image of one training step: forward and backward of the student, forward of the teacher."""
    parts = forward_flops(vit, decoder, mask_ratio)
    forward = sum(parts.values())
    return (4 if with_teacher else 3) * forward - parts["patch_embed"]  # the image needs no gradient


def _block_flops(tokens: int, width: int, mlp_ratio: float) -> int:
    return int((8 + 4 * mlp_ratio) * tokens * width**2) + 4 * tokens**2 * width


def num_parameters(vit: ViTConfig, decoder: DecoderConfig) -> tuple[int, int]:
    """Trainable parameters of encoder and decoder."""
    encoder = (vit.patch_values + 1 + 1) * vit.embed_dim + vit.depth * _block_parameters(vit.embed_dim, vit.mlp_ratio)
    encoder += 2 * vit.embed_dim  # final norm
    width = decoder.embed_dim
    head = (vit.embed_dim + 1) * width + width + 2 * width + (width + 1) * vit.patch_values
    return encoder, head + decoder.depth * _block_parameters(width, vit.mlp_ratio)


def _block_parameters(width: int, mlp_ratio: float) -> int:
    hidden = int(width * mlp_ratio)
    return 4 * width + 3 * width * (width + 1) + width * (width + 1) + hidden * (width + 1) + width * (hidden + 1)


def fixed_bytes(vit: ViTConfig, decoder: DecoderConfig, with_teacher: bool) -> int:
    """Memory that does not depend on the batch: weights, gradients, two moments, teacher, all float32."""
    return 4 * sum(num_parameters(vit, decoder)) * (5 if with_teacher else 4)


def activation_bytes(vit: ViTConfig, decoder: DecoderConfig, mask_ratio: float, bf16: bool) -> int:
    """About how much memory one image takes between forward and backward.

    Per block and token about (12 + 3 mlp_ratio) widths are held at the peak: measured on a CPU, 0.6 to 1.0 of this for
    widths from 768 down to 128; under bf16 autocast about 60 %.
    """
    L, K = vit.num_patches, num_kept(vit.num_patches, mask_ratio)
    kept = 12 + 3 * vit.mlp_ratio
    values = kept * (vit.depth * (K + 1) * vit.embed_dim + decoder.depth * (L + 1) * decoder.embed_dim)
    values += 4 * L * vit.patch_values  # images, patches, target, prediction
    return int(values * 4 * (0.6 if bf16 else 1.0))


def checkpoint_bytes(vit: ViTConfig, decoder: DecoderConfig, with_teacher: bool) -> int:
    """Disk space of one checkpoint: student, two moments, teacher, position tables."""
    tables = (vit.num_patches + 1) * (vit.embed_dim + decoder.embed_dim)
    return 4 * (sum(num_parameters(vit, decoder)) * (4 if with_teacher else 3) + 2 * tables)
