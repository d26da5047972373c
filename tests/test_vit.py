"""The Vision Transformer: patch order, position table, initialisation, dense features, and the shortcuts it takes."""

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from core.vit import (
    Block,
    PatchEmbed,
    ViT,
    ViTConfig,
    gather_patches,
    patchify,
    resize_pos_embed,
    sincos_pos_embed,
    unpatchify,
)
from pretrain.mae import DecoderConfig, MaskedAutoencoder
from tests.golden_files import require
from tools.verify.golden import FOLDER
from tools.verify.pretraining import against_timm, positions

SMALL = ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=24, depth=3, num_heads=3)  # a grid of 4 x 4
DECODER = DecoderConfig(embed_dim=16, depth=2, num_heads=2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def noisy(config: ViTConfig, seed: int = 0) -> ViT:
    """A ViT of which no tensor is zero or one."""
    vit = ViT(config)
    vit.init_weights(seeded(seed))
    with torch.no_grad():
        for i, parameter in enumerate(vit.parameters()):
            parameter += 0.05 * randn(*parameter.shape, seed=1000 * seed + i)
    return vit.eval().requires_grad_(False)


@pytest.mark.parametrize(("channels", "height", "width", "patch"), [(3, 8, 8, 4), (1, 6, 9, 3), (4, 10, 4, 2)])
def test_unpatchify_inverts_patchify(channels: int, height: int, width: int, patch: int) -> None:
    images = randn(2, channels, height, width)
    patches = patchify(images, patch)
    assert patches.shape == (2, (height // patch) * (width // patch), channels * patch * patch)
    assert torch.equal(unpatchify(patches, patch, (height // patch, width // patch)), images)


def test_patchify_is_row_major_with_the_channel_fastest() -> None:
    p, C, H, W = 2, 3, 4, 6
    images = torch.arange(C * H * W, dtype=torch.float32).reshape(1, C, H, W)
    patches = patchify(images, p)
    for row in range(H // p):
        for column in range(W // p):
            for dy in range(p):
                for dx in range(p):
                    for c in range(C):
                        value = patches[0, row * (W // p) + column, (dy * p + dx) * C + c]
                        assert value == images[0, c, row * p + dy, column * p + dx]


@pytest.mark.parametrize(("height", "width"), [(9, 8), (8, 9), (3, 3)])
def test_patchify_refuses_a_size_that_the_patch_does_not_divide(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"{height}x{width} px .*patch side 4"):
        patchify(torch.zeros(1, 3, height, width), 4)


def test_gather_patches_picks_rows_per_image() -> None:
    x = randn(2, 5, 3)
    ids = torch.tensor([[4, 0], [2, 2]])
    expected = torch.stack([x[0, [4, 0]], x[1, [2, 2]]])
    assert torch.equal(gather_patches(x, ids), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_patch_embed_equals_the_convolution_whose_weights_it_holds(channels: int) -> None:
    config = ViTConfig(img_size=(16, 24), patch_size=4, in_chans=channels, embed_dim=8, depth=1, num_heads=2)
    embed = PatchEmbed(config).double()
    images = randn(2, channels, 16, 24, dtype=torch.float64)
    expected = embed.proj(images).flatten(2).transpose(1, 2)  # [B, L, D], row-major
    torch.testing.assert_close(embed(patchify(images, 4)), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("num_queries", [1, 4, 9])
def test_a_block_with_fewer_queries_gives_the_last_rows_of_the_full_block(num_queries: int) -> None:
    torch.manual_seed(0)
    block = Block(24, num_heads=3, mlp_ratio=2.0).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    x = randn(2, 9, 24, dtype=torch.float64)
    full, last = block(x), block(x, num_queries=num_queries)
    assert last.shape == (2, num_queries, 24)
    torch.testing.assert_close(last, full[:, -num_queries:], atol=1e-12, rtol=1e-12)


def test_a_block_is_the_pre_norm_transformer_written_out() -> None:
    torch.manual_seed(0)
    D, heads, N = 12, 3, 5
    block = Block(D, heads, mlp_ratio=2.0).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_()
    x = randn(1, N, D, dtype=torch.float64)

    def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias

    qkv = norm(x, block.norm1) @ block.attn.qkv.weight.T + block.attn.qkv.bias
    size = D // heads
    outs = []
    for head in range(heads):  # channels are [q | k | v], each split into heads, head slow
        q, k, v = (qkv[..., part * D + head * size : part * D + (head + 1) * size] for part in range(3))
        outs.append((q @ k.transpose(1, 2) * size**-0.5).softmax(-1) @ v)
    y = x + torch.cat(outs, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
    hidden = norm(y, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))  # the exact GELU
    y = y + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    torch.testing.assert_close(block(x), y, atol=1e-10, rtol=1e-10)


def test_tokens_with_all_patches_in_order_are_the_tokens() -> None:
    vit, images = noisy(SMALL), randn(2, 3, 32, 32)
    ids = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(vit.tokens(images, ids), vit.tokens(images), atol=1e-6, rtol=1e-5)


def test_permuting_the_kept_patches_permutes_their_tokens() -> None:
    vit, images = noisy(SMALL), randn(2, 3, 32, 32)
    ids = torch.stack([torch.randperm(16, generator=seeded(i))[:6] for i in (3, 4)])
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    tokens, permuted = vit.tokens(images, ids), vit.tokens(images, ids[:, order])
    assert tokens.shape == (2, 7, 24)
    torch.testing.assert_close(permuted[:, 1:], tokens[:, 1:][:, order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(permuted[:, 0], tokens[:, 0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(tokens[:, 1:], tokens[:, 1:][:, order], atol=1e-2)


def test_hidden_patches_have_no_influence() -> None:
    vit, images = noisy(SMALL), randn(1, 3, 32, 32)
    ids = torch.tensor([[2, 9]])
    other = images.clone()
    other[..., 24:, 24:] += 1.0  # patch 15
    assert torch.equal(vit.tokens(images, ids), vit.tokens(other, ids))
    assert not torch.equal(vit.tokens(images), vit.tokens(other))


@pytest.mark.parametrize("shape", [(3, 16, 64), (3, 64, 64), (3, 8, 8), (1, 32, 32)])
def test_tokens_of_another_image_size_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"expected \[3, 32, 32\]"):  # 16 x 64 has as many patches, elsewhere
        ViT(SMALL).tokens(torch.zeros(2, *shape))


def after_blocks(vit: ViT, images: Tensor) -> list[Tensor]:
    """What every block gives when `vit` runs on images of its own size, seen from outside."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: seen.append(out)) for block in vit.blocks]
    vit.tokens(images)
    for hook in hooks:
        hook.remove()
    return seen


def test_feature_maps_are_the_block_outputs_in_the_order_asked_for() -> None:
    vit, images = noisy(SMALL), randn(2, 3, 32, 32)
    blocks = after_blocks(vit, images)
    maps = vit.feature_maps(images, [2, 0])
    assert [tuple(m.shape) for m in maps] == [(2, 24, 4, 4)] * 2
    for got, index in zip(maps, (2, 0), strict=True):
        for row, column in ((0, 0), (1, 3), (3, 1)):
            torch.testing.assert_close(got[:, :, row, column], blocks[index][:, 1 + row * 4 + column])
    last = maps[0].flatten(2).transpose(1, 2)  # [B, L, D]
    torch.testing.assert_close(vit.norm(last), vit.tokens(images)[:, 1:])  # the final norm is not in the map
    assert not torch.allclose(last, vit.tokens(images)[:, 1:], atol=1e-2)


@pytest.mark.parametrize("size", [(16, 48), (40, 24), (64, 64)])
def test_feature_maps_of_other_sizes_have_resized_positions(size: tuple[int, int]) -> None:
    vit, images = noisy(SMALL), randn(1, 3, *size)
    grid = (size[0] // 8, size[1] // 8)
    other = ViT(SMALL.model_copy(update={"img_size": size})).requires_grad_(False)
    table = vit.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    other.load_state_dict({**vit.state_dict(), "pos_embed": torch.cat([vit.pos_embed[:, :1], table], dim=1)})
    (got,) = vit.feature_maps(images, [1])
    expected = after_blocks(other, images)[1][:, 1:].transpose(1, 2).reshape(1, 24, *grid)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_ids", [[3], [0, -1], [7, 1]])
def test_feature_maps_of_an_unknown_block_are_refused(block_ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"are not in 0\.\.2"):
        ViT(SMALL).feature_maps(torch.zeros(1, 3, 32, 32), block_ids)


@pytest.mark.parametrize("size", [(33, 32), (32, 20), (7, 32)])
def test_feature_maps_of_an_indivisible_size_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} px .*patch side 8"):
        ViT(SMALL).feature_maps(torch.zeros(1, 3, *size), [0])


def test_position_table_has_the_published_values_and_resizes_as_published() -> None:
    table = sincos_pos_embed(768, (14, 14))
    assert table.shape == (1, 197, 768) and table.dtype == torch.float32
    require(positions(FOLDER))


def test_position_table_of_a_non_square_grid_does_not_swap_rows_and_columns() -> None:
    table = sincos_pos_embed(8, (2, 3))[0]  # omega is 1 and 0.01
    assert table.shape == (7, 8)
    sin, cos = math.sin, math.cos
    by_hand = {
        (0, 1): [sin(1), sin(0.01), cos(1), cos(0.01), 0, 0, 1, 1],
        (1, 0): [0, 0, 1, 1, sin(1), sin(0.01), cos(1), cos(0.01)],
        (1, 2): [sin(2), sin(0.02), cos(2), cos(0.02), sin(1), sin(0.01), cos(1), cos(0.01)],
    }
    for (row, column), expected in by_hand.items():
        torch.testing.assert_close(table[1 + row * 3 + column], torch.tensor(expected), atol=1e-7, rtol=0)


def test_position_tables_of_a_model_follow_its_grid() -> None:
    config = SMALL.model_copy(update={"img_size": (16, 32)})
    model = MaskedAutoencoder(config, DECODER)
    assert torch.equal(model.pos_embed.data, sincos_pos_embed(24, (2, 4)))
    assert torch.equal(model.decoder_pos_embed.data, sincos_pos_embed(16, (2, 4)))


def test_resized_position_table_is_the_same_if_the_grid_is() -> None:
    table = randn(1, 13, 8)
    assert resize_pos_embed(table, (3, 4), (3, 4)) is table
    resized = resize_pos_embed(table, (3, 4), (6, 2))
    assert resized.shape == (1, 13, 8) and torch.equal(resized[:, 0], table[:, 0])
    assert not torch.allclose(resized, table, atol=1e-2)


def test_initialisation_is_the_published_one() -> None:
    D, E, P = 256, 128, 3 * 16**2
    config = ViTConfig(img_size=(32, 32), patch_size=16, embed_dim=D, depth=1, num_heads=4)
    model = MaskedAutoencoder(config, DecoderConfig(embed_dim=E, depth=1, num_heads=4))
    model.init_weights(seeded())
    bounds = {"patch_embed.proj.weight": math.sqrt(6 / (P + D)), "patch_embed.proj.bias": 1 / math.sqrt(P)}
    for block, width in (("blocks.0", D), ("decoder_blocks.0", E)):
        bounds |= {
            f"{block}.attn.qkv.weight": math.sqrt(6 / (4 * width)),  # one [3D, D] matrix
            f"{block}.attn.proj.weight": math.sqrt(6 / (2 * width)),
            f"{block}.mlp.fc1.weight": math.sqrt(6 / (5 * width)),
            f"{block}.mlp.fc2.weight": math.sqrt(6 / (5 * width)),
        }
    bounds |= {"decoder_embed.weight": math.sqrt(6 / (D + E)), "decoder_pred.weight": math.sqrt(6 / (E + P))}
    norms = {"norm", "decoder_norm", *(f"{b}.norm{i}" for b in ("blocks.0", "decoder_blocks.0") for i in (1, 2))}
    rest = set()
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if name in bounds:  # uniform: inside the bound, close to it, of its spread
            bound = bounds.pop(name)
            assert tensor.abs().max() <= bound, name
            assert tensor.abs().max() > (0.95 if tensor.numel() < 1000 else 0.999) * bound, name
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
        elif module in norms:
            assert torch.equal(tensor, torch.ones_like(tensor) if leaf == "weight" else torch.zeros_like(tensor)), name
        elif leaf == "bias":
            assert not tensor.any(), name
        else:
            rest.add(name)
    assert not bounds and rest == {"cls_token", "mask_token", "pos_embed", "decoder_pos_embed"}


@pytest.mark.parametrize("name", ["cls_token", "mask_token"])
def test_tokens_are_normal_and_not_truncated(name: str) -> None:
    config = ViTConfig(img_size=(8, 8), patch_size=8, embed_dim=2048, depth=1, num_heads=1, mlp_ratio=0.01)
    model = MaskedAutoencoder(config, DecoderConfig(embed_dim=2048, depth=1, num_heads=1))
    model.init_weights(seeded())
    token = getattr(model, name).detach()
    assert token.std().item() == pytest.approx(0.02, rel=0.06) and abs(token.mean().item()) < 0.002
    assert token.abs().max() > 0.05  # 2.5 standard deviations: a sample cut at two would not reach it


def test_initialisation_follows_the_generator() -> None:
    models = [MaskedAutoencoder(SMALL, DECODER) for _ in range(3)]
    for i, (model, seed) in enumerate(zip(models, (5, 5, 6), strict=True)):
        torch.manual_seed(i)  # the global generator must not matter
        model.init_weights(seeded(seed))
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["mask_token"], other["mask_token"])
    assert not torch.equal(first["blocks.1.attn.qkv.weight"], other["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize("kind", ["vit", "mae"])
def test_no_parameter_is_left_uninitialised(kind: str) -> None:
    model = ViT(SMALL) if kind == "vit" else MaskedAutoencoder(SMALL, DECODER)
    fixed = {"pos_embed", "decoder_pos_embed"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in fixed:
                parameter.fill_(math.nan)
    model.init_weights(seeded())
    assert [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()] == []
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == (
        set() if kind == "vit" else fixed
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"img_size": (32, 30)}, "img_size=30 is not divisible by patch_size=8"),
        ({"img_size": (9, 32)}, "img_size=9 is not divisible by patch_size=8"),
        ({"embed_dim": 20}, "embed_dim=20 is not divisible by num_heads=3"),
        ({"embed_dim": 30}, "embed_dim=30 is not divisible by 4"),
        ({"depth": 0}, "depth"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"mlp_ratio": math.inf}, "mlp_ratio"),
        ({"patch_size": -8}, "patch_size"),
        ({"num_head": 3}, "num_head"),
    ],
)
def test_sizes_that_cannot_hold_together_are_refused(changes: dict, expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        ViTConfig(**{**SMALL.model_dump(), **changes})


def test_all_contradictions_are_told_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        ViTConfig(img_size=(30, 31), patch_size=8, embed_dim=30, depth=1, num_heads=4)
    lines = caught.value.errors()[0]["msg"].splitlines()
    assert [line.rpartition("Value error, ")[2].split("=")[0] for line in lines] == ["img_size"] * 2 + ["embed_dim"] * 2


def test_derived_sizes() -> None:
    config = ViTConfig(img_size=(16, 48), patch_size=8, in_chans=2, embed_dim=8, depth=1, num_heads=1)
    assert (config.grid, config.num_patches, config.patch_values) == ((2, 6), 12, 128)


def test_tokens_and_maps_are_timms() -> None:
    require(against_timm())
