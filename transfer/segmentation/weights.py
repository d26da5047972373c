"""mmsegmentation's UperNet on its MAE backbone under this suite's names, and back. Spec segmentation section 10.

A name is a prefix from the table below and a rest that stays. Nothing else is done to a tensor.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.attention import num_distances, relative_position_index
from core.errors import CheckpointError, shown
from core.vit import ViTConfig
from transfer.segmentation.necks import NUM_LEVELS
from transfer.segmentation.segmentor import SegmentorConfig

State = dict[str, Tensor]
_PREFIXES = (  # mmsegmentation's and ours; {} is a number
    ("backbone.cls_token", "backbone.cls_token"),
    ("backbone.pos_embed", "backbone.pos_embed"),
    ("backbone.patch_embed.projection.", "backbone.patch_embed.proj."),
    ("backbone.layers.{}.ln1.", "backbone.blocks.{}.norm1."),
    ("backbone.layers.{}.ln2.", "backbone.blocks.{}.norm2."),
    ("backbone.layers.{}.attn.qkv.", "backbone.blocks.{}.attn.qkv."),
    ("backbone.layers.{}.attn.proj.", "backbone.blocks.{}.attn.proj."),
    ("backbone.layers.{}.attn.relative_position_bias_table", "backbone.blocks.{}.attn.relative_position_bias_table"),
    ("backbone.layers.{}.gamma_", "backbone.blocks.{}.gamma_"),
    ("backbone.layers.{}.ffn.layers.0.0.", "backbone.blocks.{}.mlp.fc1."),
    ("backbone.layers.{}.ffn.layers.1.", "backbone.blocks.{}.mlp.fc2."),
    ("neck.upsample_4x.", "neck.upsample_4x."),
    ("neck.upsample_2x.0.", "neck.upsample_2x."),
    ("decode_head.psp_modules.{}.1.", "decode_head.ppm.branches.{}."),
    ("decode_head.bottleneck.", "decode_head.ppm.bottleneck."),
    ("decode_head.lateral_convs.{}.", "decode_head.lateral_convs.{}."),
    ("decode_head.fpn_convs.{}.", "decode_head.fpn_convs.{}."),
    ("decode_head.fpn_bottleneck.", "decode_head.fpn_bottleneck."),
    ("decode_head.conv_seg.", "decode_head.conv_seg."),
    ("auxiliary_head.convs.0.", "auxiliary_head.conv."),
    ("auxiliary_head.conv_seg.", "auxiliary_head.conv_seg."),
)
_NO_WEIGHTS = re.compile(r"data_preprocessor\..*|backbone\.layers\.\d+\.attn\.relative_position_index")
_OTHER_NETWORKS = (  # what only they have, and what they are
    (r"backbone\.layers\.\d+\.attn\.(q|v)_bias", "a BEiT backbone"),
    (r"backbone\.layers\.\d+\.attn\.attn\..*", "mmsegmentation's VisionTransformer backbone"),
    (r"backbone\.stages\.\d+\.blocks\..*", "a Swin backbone"),
    (r"backbone\.layers\.\d+\.\d+\..*", "a MixVisionTransformer backbone (SegFormer)"),
    (r"backbone\.(layer1|stem)\..*", "a ResNet backbone"),
    (r"backbone\.downsample_layers\..*", "a ConvNeXt backbone"),
    (r"neck\.(lateral_)?convs\..*", "a MultiLevelNeck"),
)


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did with every tensor.

    Attributes:
        mapped: new name by old name.
        ignored: tensors that are no weights: pixel means, indices that follow from the size.
        added: what the other side expects and a plain ViT does not have: tables of zeros, factors of one, indices.
    """

    mapped: dict[str, str]
    ignored: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For a log: every renaming, what was left out and what was added."""
        return [
            *(f"{shown(old)} -> {shown(new)}" for old, new in self.mapped.items()),
            *(f"ignored  {shown(name)}" for name in self.ignored),
            *(f"added    {shown(name)}" for name in self.added),
        ]


def from_mmseg(state: Mapping[str, Tensor]) -> tuple[State, ConversionReport]:
    """The state dict of mmsegmentation's UperNet with the MAE backbone as one of `Segmentor`.

    Raises: CheckpointError for another network, by its name where it is a known one, and for an unknown tensor; nothing
        is dropped in silence.
    """
    for pattern, network in _OTHER_NETWORKS:
        found = next((name for name in state if re.fullmatch(pattern, name)), None)
        if found:
            raise CheckpointError(
                f"{shown(found)}: this is {network}; only UperNet on mmsegmentation's MAE backbone is converted"
            )
    ignored = tuple(name for name in state if _NO_WEIGHTS.fullmatch(name))
    names = _renamed([name for name in state if name not in ignored], _PREFIXES)
    return {names[old]: tensor for old, tensor in state.items() if old in names}, ConversionReport(names, ignored)


def to_mmseg(state: Mapping[str, Tensor], vit: ViTConfig) -> tuple[State, ConversionReport]:
    """The state dict of a `Segmentor` as mmsegmentation names it, complete for its MAE backbone.

    Args:
        vit: that of the segmentor. Of a plain one the result has tables of zeros and factors of one, which is the same.
    Raises: CheckpointError if a name is unknown, or for a ViT without class token.
    """
    if not vit.class_token:
        raise CheckpointError("mmsegmentation's MAE backbone has a class token, this ViT has none")
    names = _renamed(list(state), [(ours, theirs) for theirs, ours in _PREFIXES])
    converted = {names[old]: tensor for old, tensor in state.items()}
    added = {name: tensor for name, tensor in _expected(vit).items() if name not in converted}
    return {**converted, **added}, ConversionReport(names, added=tuple(added))


def sizes_of(state: Mapping[str, Tensor], img_size: tuple[int, int] | None = None) -> tuple[ViTConfig, SegmentorConfig]:
    """The sizes of the ViT and of the segmentor that a converted state dict belongs to.

    What leaves no trace in the weights (blocks, pool scales, dropout) has its default.

    Args:
        img_size: (height, width) that it was made for; None: a square.
    Raises: CheckpointError if it is no such state dict.
    """
    try:
        vit = _vit_config(state, img_size)
        return vit, _segmentor_config(state)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"no weights of UperNet on a ViT: {shown(str(error))}") from None


def _renamed(names: Sequence[str], prefixes: Sequence[tuple[str, str]]) -> dict[str, str]:
    """New name by old one."""
    patterns = [(re.compile(re.escape(old).replace(r"\{\}", r"(\d+)") + "(.*)"), new + "{}") for old, new in prefixes]
    renamed: dict[str, str] = {}
    unknown = []
    for name in names:
        found = next(((m, new) for pattern, new in patterns if (m := pattern.fullmatch(name))), None)
        if found is None:
            unknown.append(name)
        else:
            renamed[name] = found[1].format(*found[0].groups())
    if unknown:
        first = ", ".join(map(shown, unknown[:6])) + (f" and {len(unknown) - 6} more" if len(unknown) > 6 else "")
        raise CheckpointError(f"no place for {first}; expected UperNet on mmsegmentation's MAE backbone")
    return renamed


def _expected(vit: ViTConfig) -> State:
    """What mmsegmentation's MAE backbone has beyond a plain ViT."""
    index = relative_position_index(vit.grid)
    tensors: State = {}
    for i in range(vit.depth):
        layer = f"backbone.layers.{i}."
        tensors[f"{layer}attn.relative_position_bias_table"] = torch.zeros(num_distances(vit.grid), vit.num_heads)
        tensors[f"{layer}attn.relative_position_index"] = index.clone()
        tensors[f"{layer}gamma_1"], tensors[f"{layer}gamma_2"] = torch.ones(vit.embed_dim), torch.ones(vit.embed_dim)
    return tensors


def _vit_config(state: Mapping[str, Tensor], img_size: tuple[int, int] | None) -> ViTConfig:
    dim, in_chans, patch_size, _ = state["backbone.patch_embed.proj.weight"].shape
    num_patches = state["backbone.pos_embed"].shape[1] - 1
    side = math.isqrt(num_patches)
    grid = (side, side) if img_size is None else (img_size[0] // patch_size, img_size[1] // patch_size)
    table = state["backbone.blocks.0.attn.relative_position_bias_table"]
    if grid[0] * grid[1] != num_patches or len(table) != num_distances(grid):
        raise ValueError(f"{num_patches} positions and a table of {len(table)} rows do not suit {grid[0]}x{grid[1]}")
    return ViTConfig(
        img_size=(grid[0] * patch_size, grid[1] * patch_size),
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=dim,
        depth=_count(state, r"backbone\.blocks\.(\d+)\.norm1\.weight"),
        num_heads=table.shape[1],
        mlp_ratio=len(state["backbone.blocks.0.mlp.fc1.bias"]) / dim,
        rel_pos_bias=True,
        layer_scale=True,
        final_norm=False,
    )


def _segmentor_config(state: Mapping[str, Tensor]) -> SegmentorConfig:
    defaults = SegmentorConfig()
    num_branches = _count(state, r"decode_head\.ppm\.branches\.(\d+)\.bn\.weight")
    if num_branches != len(defaults.pool_scales):
        raise ValueError(f"pyramid pooling of {num_branches} scales, expected {list(defaults.pool_scales)}")
    num_laterals = _count(state, r"decode_head\.lateral_convs\.(\d+)\.bn\.weight")
    if num_laterals != NUM_LEVELS - 1:
        raise ValueError(f"{num_laterals} lateral convolutions, expected {NUM_LEVELS - 1}")
    num_classes = len(state["decode_head.conv_seg.bias"])
    return SegmentorConfig(
        num_classes=num_classes,
        ignore_index=255 if num_classes <= 255 else 2**16 - 1,  # the most that a label file can hold
        channels=len(state["decode_head.fpn_bottleneck.bn.weight"]),
        aux_channels=len(state["auxiliary_head.conv.bn.weight"]),
    )


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.fullmatch(pattern, name))})
