"""The published sizes by name (spec section 1). The decoder differs for tiny and small: it is no part of the ViT."""

from core.vit import ViTConfig
from pretrain.mae import DecoderConfig

ENCODERS: dict[str, dict[str, int]] = {
    "tiny": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}
DECODERS: dict[str, dict[str, int]] = {
    "tiny": {"embed_dim": 128, "depth": 2, "num_heads": 4},
    "small": {"embed_dim": 256, "depth": 4, "num_heads": 8},
    "base": {"embed_dim": 512, "depth": 8, "num_heads": 16},
    "large": {"embed_dim": 512, "depth": 8, "num_heads": 16},
    "huge": {"embed_dim": 512, "depth": 8, "num_heads": 16},
}


def preset(name: str, img_size: tuple[int, int] = (224, 224)) -> tuple[ViTConfig, DecoderConfig]:
    """Encoder and decoder sizes of a published model."""
    return ViTConfig(img_size=img_size, **ENCODERS[name]), DecoderConfig(**DECODERS[name])
