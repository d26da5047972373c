"""What a ViT costs before it is built: FLOPs (a multiply-add is 2), parameters, memory.

Norms, softmax and GELU are not counted among the FLOPs. Source: spec pretrain section 7, spec classify section 1.
"""

from core.vit import ViTConfig


def block_flops(tokens: int, width: int, mlp_ratio: float) -> int:
    """FLOPs of one transformer block on one image."""
    return int((8 + 4 * mlp_ratio) * tokens * width**2) + 4 * tokens**2 * width


def encoder_flops(vit: ViTConfig, num_kept: int) -> int:
    """FLOPs of all blocks on one image of which so many patches are seen; the class token is added."""
    return vit.depth * block_flops(num_kept + 1, vit.embed_dim, vit.mlp_ratio)


def patch_embed_flops(vit: ViTConfig) -> int:
    """FLOPs of embedding all patches of one image."""
    return 2 * vit.num_patches * vit.patch_values * vit.embed_dim


def block_parameters(width: int, mlp_ratio: float) -> int:
    """Parameters of one transformer block."""
    hidden = int(width * mlp_ratio)
    return 4 * width + 3 * width * (width + 1) + width * (width + 1) + hidden * (width + 1) + width * (hidden + 1)


def encoder_parameters(vit: ViTConfig) -> int:
    """Parameters of the encoder without its position table."""
    embedding = (vit.patch_values + 1 + 1) * vit.embed_dim  # patch embedding and class token
    return embedding + vit.depth * block_parameters(vit.embed_dim, vit.mlp_ratio) + 2 * vit.embed_dim  # final norm


def held_values(vit: ViTConfig, num_tokens: int) -> float:
    """About how many values one image holds between forward and backward in all blocks.

    Per block and token about (12 + 3 mlp_ratio) widths at the peak: measured on a CPU, 0.6 to 1.0 of this for widths
    from 768 down to 128.
    """
    return (12 + 3 * vit.mlp_ratio) * vit.depth * num_tokens * vit.embed_dim


BF16_SHARE = 0.6  # of float32's memory, measured under bf16 autocast
