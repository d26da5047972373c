"""From a pretrained ViT to the one of a detector: windows, relative positions, patches that the pyramid can divide."""

import torch.nn.functional as F
from torch import Tensor

from core.errors import ConfigError, shown
from core.vit import ViT, ViTConfig, resize_pos_embed
from transfer.detection.settings import DetectConfig


def dense_vit(plain: ViT, config: DetectConfig) -> ViT:
    """A pretrained ViT with windows and relative positions; its class token and final norm stay behind.

    Raises: ConfigError for a patch side that does not suit pyramid or images, or blocks that the ViT does not have.
    """
    sizes, patch_size = plain.config, config.patch_size or plain.config.patch_size
    if patch_size % 4:
        raise ConfigError(
            f"{shown(config.backbone)}: patches of {patch_size} px, the feature pyramid needs a side that 4 divides; "
            "patch_size=16 resamples them"
        )
    if config.img_size % patch_size:
        raise ConfigError(f"img_size={config.img_size}: not divisible by patches of {patch_size} px")
    if max(config.global_blocks or (0,)) >= sizes.depth:
        raise ConfigError(f"global_blocks={list(config.global_blocks or ())}: the backbone has {sizes.depth} blocks")
    last_of_each_quarter = tuple(-(-sizes.depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4))
    blocks = tuple(sorted(set(config.global_blocks or last_of_each_quarter)))
    side = config.img_size // patch_size
    rows, columns = (max(1, pixels // patch_size) for pixels in sizes.img_size)
    changed = {
        "img_size": (rows * patch_size, columns * patch_size),
        "patch_size": patch_size,
        "class_token": False,
        "window_size": config.window_size,
        "global_blocks": blocks if config.window_size else (),
        "rel_pos_grid": (side, side) if config.rel_pos else None,
    }
    dense = ViTConfig(**{**sizes.model_dump(), **changed})
    vit, known = ViT(dense), resampled(plain.state_dict(), sizes, dense)
    vit.load_state_dict({name: known.get(name, tensor) for name, tensor in vit.state_dict().items()})
    vit.checkpointing = config.activation_checkpointing
    return vit


def resampled(state: dict[str, Tensor], old: ViTConfig, new: ViTConfig) -> dict[str, Tensor]:
    """Weights of a ViT for patches of another side: kernel and positions resized bicubically, all else as it was.

    ViTDet-H was made so from MAE's ViT-H of 14 px; how exactly is not published. Spec detection 7.2.
    """
    if new.patch_size == old.patch_size:
        return state
    kernel = F.interpolate(state["patch_embed.proj.weight"], size=(new.patch_size,) * 2, mode="bicubic")  # [D, C, P, P]
    positions = resize_pos_embed(state["pos_embed"], old.grid, new.grid)
    return {**state, "patch_embed.proj.weight": kernel, "pos_embed": positions}
