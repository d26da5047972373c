"""The one plain Vision Transformer of the suite, with timm's parameter names.

Letters: B batch, C channels, H W image, P patch side, L patches, K kept patches, N tokens, D width.
"""

import math
from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.attention import Attention, Grid, merge_windows, split_windows
from core.config import Config

LAYER_NORM_EPS = 1e-6


class ViTConfig(Config):
    """Sizes of a ViT. `img_size` is (height, width) in pixels, both divisible by `patch_size`.

    `class_token` to `rel_pos_grid` make the ViT of a detector out of it (ViTDet, arXiv:2203.16527): it has no class
    token and no final norm, most blocks attend in windows, and all know relative positions. The last three make that of
    the published segmentation (spec segmentation section 1.1).
    """

    img_size: tuple[PositiveInt, PositiveInt]  # that the position table is made for
    patch_size: PositiveInt
    in_chans: PositiveInt = 3
    embed_dim: PositiveInt
    depth: PositiveInt
    num_heads: PositiveInt
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    class_token: bool = True  # False: dense features alone, and no final norm
    window_size: PositiveInt | None = None  # side of the windows in patches; None: every block attends globally
    global_blocks: tuple[NonNegativeInt, ...] = ()  # blocks that attend globally although others have windows
    rel_pos_grid: tuple[PositiveInt, PositiveInt] | None = None  # grid that global relative positions are made for
    rel_pos_bias: bool = False  # a bias per head and distance in every block, which binds the ViT to `img_size`
    layer_scale: bool = False  # a factor per channel, one at first, on each branch of every block
    final_norm: bool = True  # False: what follows has no use for one; a ViT without class token has none anyhow

    def contradictions(self) -> Iterator[str]:
        """Sizes that cannot hold together."""
        for side in sorted(set(self.img_size)):
            if side % self.patch_size:
                yield f"img_size={side} is not divisible by patch_size={self.patch_size}"
        if self.embed_dim % self.num_heads:
            yield f"embed_dim={self.embed_dim} is not divisible by num_heads={self.num_heads}"
        if self.embed_dim % 4:
            yield f"embed_dim={self.embed_dim} is not divisible by 4, as the sin-cos position table needs"
        if self.class_token and (self.window_size or self.rel_pos_grid):
            yield "class_token: has no place in windows or grids; false where window_size or rel_pos_grid is given"
        if self.rel_pos_bias and not self.class_token:
            yield "rel_pos_bias: knows a class token; class_token=false has rel_pos_grid"
        if self.global_blocks and not (self.window_size and max(self.global_blocks) < self.depth):
            yield f"global_blocks={list(self.global_blocks)}: needs window_size, and blocks below depth={self.depth}"

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """L, patches per image."""
        return self.grid[0] * self.grid[1]

    def table_grid(self, block: int) -> Grid | None:
        """The grid that relative positions of a block are made for; None where it has none."""
        if self.rel_pos_grid is None:
            return None
        window = self.window_of(block)
        return (window, window) if window else self.rel_pos_grid

    def window_of(self, block: int) -> int | None:
        """Side of a block's windows in patches; None where it attends globally."""
        return None if block in self.global_blocks else self.window_size

    @property
    def patch_values(self) -> int:
        """Values per patch, C * P * P."""
        return self.in_chans * self.patch_size**2


class PatchEmbed(nn.Module):
    """Holds the patch convolution under timm's name; applied as a linear map on flat patches, which is the same."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, stride=config.patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Embed patches [B, N, P*P*C] (channel fastest, as `patchify` gives them) to [B, N, D]."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # [D, P*P*C]
        return F.linear(patches, weight, self.proj.bias)


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] to [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x)); the attention may be in windows.

    With `layer_scale` the branches are multiplied by `gamma_1` and `gamma_2`, a number per channel (arXiv:2103.17239).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        window_size: int | None = None,
        table_grid: Grid | None = None,
        bias_grid: Grid | None = None,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        self.window_size, self.layer_scale = window_size, layer_scale
        if layer_scale:
            self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, table_grid, bias_grid)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        num_queries: int | None = None,
        branch_scale: Tensor | None = None,
        grid: Grid | None = None,
    ) -> Tensor:
        """[B, N, D] to [B, N, D]; with `num_queries` = M only the last M tokens are computed: [B, M, D].

        Args:
            grid: rows and columns of the tokens, which windows and relative positions need.
            branch_scale: [2, B, 1, 1], what the attention and the MLP branch of each image are multiplied by
                (`drop_path_scales`); None multiplies by nothing.
        """
        attended = self._attend(self.norm1(x), num_queries, grid)
        if self.layer_scale:
            attended = self.gamma_1 * attended
        if branch_scale is not None:
            attended = attended * branch_scale[0].to(attended.dtype)
        x = attended + (x if num_queries is None else x[:, -num_queries:])
        out = self.mlp(self.norm2(x))
        if self.layer_scale:
            out = self.gamma_2 * out
        return x + (out if branch_scale is None else out * branch_scale[1].to(out.dtype))

    def _attend(self, x: Tensor, num_queries: int | None, grid: Grid | None) -> Tensor:
        if self.window_size is None:
            return self.attn(x, num_queries, grid)
        assert grid is not None, "windows need a grid"
        side = self.window_size
        windows = self.attn(split_windows(x, grid, side), grid=(side, side))
        return merge_windows(windows, grid, side)


class ViT(nn.Module):
    """Plain ViT encoder with a class token and one position table row per patch (row 0 is the class token's)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, config.grid))
        self.patch_embed = PatchEmbed(config)
        bias_grid = config.grid if config.rel_pos_bias else None
        self.blocks = nn.ModuleList(
            Block(
                dim, config.num_heads, config.mlp_ratio, config.window_of(i), config.table_grid(i), bias_grid,
                config.layer_scale,
            )
            for i in range(config.depth)
        )  # fmt: skip
        has_norm = config.class_token and config.final_norm
        self.norm: nn.Module = nn.LayerNorm(dim, eps=LAYER_NORM_EPS) if has_norm else nn.Identity()
        self.checkpointing = False  # recompute each block of `feature_maps` in the backward pass instead of keeping it

    def tokens(self, images: Tensor, ids_keep: Tensor | None = None, branch_scales: Tensor | None = None) -> Tensor:
        """Class token and patch tokens after the final norm.

        Args:
            images: [B, C, H, W] float, normalised; H and W as configured.
            ids_keep: [B, K] patch indices that the encoder sees, in the order wanted; None keeps all L.
            branch_scales: [depth, 2, B, 1, 1] of `drop_path_scales`; None drops nothing.
        Returns: [B, 1 + K, D] (K = L without `ids_keep`).
        Raises: ValueError for images of another size, which would get positions that are not theirs.
        """
        if images.shape[1:] != (self.config.in_chans, *self.config.img_size):
            expected = [self.config.in_chans, *self.config.img_size]
            raise ValueError(f"tokens: images [C, H, W] are {list(images.shape[1:])}, expected {expected}")
        patches = patchify(images, self.config.patch_size)  # [B, L, P*P*C]
        return self.encode(patches if ids_keep is None else gather_patches(patches, ids_keep), ids_keep, branch_scales)

    def encode(self, patches: Tensor, ids_keep: Tensor | None = None, branch_scales: Tensor | None = None) -> Tensor:
        """As `tokens`, from the kept patches themselves, [B, K, P*P*C]: nothing is embedded only to be dropped.

        Args:
            branch_scales: [depth, 2, B, 1, 1] of `drop_path_scales`; None drops nothing.
        """
        if self.config.rel_pos_bias and ids_keep is not None:
            raise ValueError("encode: a ViT with rel_pos_bias sees all patches; ids_keep must be None")
        positions = self.pos_embed[0, 1:] if ids_keep is None else self.pos_embed[0, 1:][ids_keep]  # [(B,) K, D]
        x = self._with_cls(self.patch_embed(patches) + positions, self.pos_embed)  # [B, 1 + K, D]
        for i, block in enumerate(self.blocks):
            x = block(x, branch_scale=None if branch_scales is None else branch_scales[i])
        return self.norm(x)

    def feature_maps(self, images: Tensor, block_ids: list[int], branch_scales: Tensor | None = None) -> list[Tensor]:
        """Patch tokens after the named blocks, without the final norm, as maps for dense prediction.

        Args:
            images: [B, C, H, W] float, normalised; any H and W divisible by the patch side (positions are resized).
            block_ids: 0-based block indices; the order asked for is the order returned.
            branch_scales: [depth, 2, B, 1, 1] of `drop_path_scales`; None drops nothing.
        Returns: list of [B, D, H / P, W / P].
        Raises: ValueError for a size that the patch does not divide, or that `rel_pos_bias` is not made for, and for an
            unknown block.
        """
        unknown = [i for i in block_ids if not 0 <= i < len(self.blocks)]
        if unknown:
            raise ValueError(f"feature_maps: block_ids {unknown} are not in 0..{len(self.blocks) - 1}")
        patches = patchify(images, self.config.patch_size)  # [B, L, P*P*C]
        grid = (images.shape[-2] // self.config.patch_size, images.shape[-1] // self.config.patch_size)
        if self.config.rel_pos_bias and grid != self.config.grid:
            found, made_for = (f"{rows}x{columns}" for rows, columns in (grid, self.config.grid))
            raise ValueError(f"feature_maps: rel_pos_bias is made for {made_for} patches, the images have {found}")
        pos_embed = resize_pos_embed(self.pos_embed, self.config.grid, grid)
        x = self.patch_embed(patches) + pos_embed[:, 1:]  # [B, L, D]
        if self.config.class_token:
            x = self._with_cls(x, pos_embed)  # [B, 1 + L, D]
        maps = {}
        for i, block in enumerate(self.blocks[: max(block_ids) + 1]):
            scale = None if branch_scales is None else branch_scales[i]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, branch_scale=scale, grid=grid, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, branch_scale=scale, grid=grid)
            if i in block_ids:
                patches = x[:, 1:] if self.config.class_token else x  # [B, L, D]
                maps[i] = patches.transpose(1, 2).unflatten(2, grid)  # [B, D, H / P, W / P]
        return [maps[i] for i in block_ids]

    def _with_cls(self, x: Tensor, pos_embed: Tensor) -> Tensor:
        cls_token = (self.cls_token + pos_embed[:, :1]).expand(len(x), -1, -1)  # [B, 1, D]
        return torch.cat([cls_token.to(x.dtype), x], dim=1)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every tensor but the position table. Source: MAE (arXiv:2111.06377); spec section 1.5."""
        self.apply(lambda module: init_module(module, generator))
        projection = self.patch_embed.proj
        bound = math.sqrt(6 / (self.config.patch_values + self.config.embed_dim))
        nn.init.uniform_(projection.weight, -bound, bound, generator=generator)  # Xavier on the [D, P*P*C] view
        # The published models keep the convolution's default for this one bias: it is the only one not zero.
        bound = 1 / math.sqrt(self.config.patch_values)
        nn.init.uniform_(projection.bias, -bound, bound, generator=generator)  # type: ignore[arg-type]
        if self.config.class_token:
            nn.init.normal_(self.cls_token, std=0.02, generator=generator)


def init_module(module: nn.Module, generator: torch.Generator | None) -> None:
    """Xavier-uniform weights and zero biases for linear layers, one and zero for LayerNorm; others are left alone."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight, generator=generator)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def drop_path_scales(rate: float, depth: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """Per-image stochastic depth: what each branch of each block is multiplied by, 0 or 1 / (keep probability).

    Block i drops with probability rate * i / (depth - 1); attention and MLP are drawn independently.
    Returns: [depth, 2, B, 1, 1] float32 on the generator's device. Source: spec classify section 2.6.
    """
    keep = 1 - torch.linspace(0, rate, depth, device=generator.device).view(-1, 1, 1)  # [depth, 1, 1]
    draws = torch.rand(depth, 2, batch_size, generator=generator, device=generator.device)  # [depth, 2, B]
    return ((draws < keep) / keep)[..., None, None]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images [B, C, H, W] into flattened patches [B, L, P*P*C], row-major; in a patch (row, column, channel).

    Raises: ValueError if the patch side does not divide H and W.
    """
    B, C, H, W = images.shape
    if H % patch_size or W % patch_size:
        raise ValueError(f"image of {H}x{W} px (height x width) is not divisible by the patch side {patch_size}")
    x = images.reshape(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch_size * patch_size * C)  # [B, L, P*P*C]


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: [B, L, P*P*C] with L = grid rows * columns, to [B, C, H, W]."""
    x = patches.reshape(len(patches), *grid, patch_size, patch_size, -1)  # [B, rows, columns, P, P, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # [B, C, H, W]


def gather_patches(x: Tensor, ids: Tensor) -> Tensor:
    """Pick rows of x [B, L, D] by ids [B, K], per image: [B, K, D]."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def sincos_pos_embed(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sin-cos table [1, 1 + L, D]; row 0 (class token) is zero, computed in float64, returned in float32.

    The first half of the channels encodes the column, the second the row: sin, cos, sin, cos, a quarter each.
    Source: MAE (arXiv:2111.06377); spec section 1.4.
    """
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)  # [D / 4]
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    parts = [f(axis.reshape(-1, 1) * omega) for axis in (columns, rows) for f in (torch.sin, torch.cos)]
    table = torch.cat([torch.zeros(1, dim, dtype=torch.float64), torch.cat(parts, dim=1)])  # [1 + L, D]
    return table.float().unsqueeze(0)


def resize_pos_embed(pos_embed: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize a position table [1, 1 + L, D] to another grid; the class row is kept.

    Bicubic without antialiasing and with aligned outer edges, as the published fine-tuning does.
    """
    if old_grid == new_grid:
        return pos_embed
    cls_row, table = pos_embed[:, :1], pos_embed[:, 1:]
    table = table.transpose(1, 2).unflatten(2, old_grid)  # [1, D, rows, columns]
    table = F.interpolate(table, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([cls_row, table.flatten(2).transpose(1, 2)], dim=1)  # [1, 1 + L', D]
