"""The ViT of published segmentors: relative position bias, layer scale, positions of any size; against mmsegmentation's."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from core.attention import num_distances, relative_position_index
from core.vit import ViT, ViTConfig, resize_pos_embed
from tools.verify.golden import Golden, part, read_golden
from transfer.segmentation.segmentor import published_blocks, segmentation_vit
from transfer.segmentation.weights import from_mmseg

CLOSE = {"atol": 1e-4, "rtol": 0.0}
TINY = {"img_size": (32, 48), "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def golden(shared: Path) -> Golden:
    return read_golden(shared / "golden", "segmentation_backbone")[0]


def vit_of(weights: Golden, img_size: tuple[int, int], **changes: bool) -> ViT:
    """The ViT of mmsegmentation's MAE weights, of width 48 with three heads."""
    state = part(from_mmseg({f"backbone.{name}": tensor for name, tensor in weights.items()})[0], "backbone.")
    depth = sum(name.endswith("norm1.weight") for name in state)
    published = {"rel_pos_bias": True, "layer_scale": True, "final_norm": False}
    sizes = {"patch_size": 16, "embed_dim": 48, "num_heads": 3, "depth": depth}
    vit = ViT(ViTConfig(img_size=img_size, **sizes, **{**published, **changes}))
    vit.load_state_dict(state)
    return vit.eval()


def randomized(config: ViTConfig, seed: int = 0) -> ViT:
    vit, generator = ViT(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return vit


# ---- golden values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "size"), [("mae", (64, 64)), ("mae_rectangle", (48, 80))])
def test_the_published_backbone(golden: Golden, case: str, size: tuple[int, int]) -> None:
    vit = vit_of(part(golden, f"{case}.weight."), size)
    maps = vit.feature_maps(golden[f"{case}.input"], list(range(vit.config.depth)))
    for i, found in enumerate(maps):
        torch.testing.assert_close(found, golden[f"{case}.output{i}"], **CLOSE)


def test_without_bias_and_scales_it_is_a_plain_vit(golden: Golden) -> None:
    weights = part(golden, "mae.weight.")
    kept = {name: t for name, t in weights.items() if "relative_position" not in name and "gamma" not in name}
    plain = vit_of(kept, (64, 64), rel_pos_bias=False, layer_scale=False)
    (last,) = plain.feature_maps(golden["mae.input"], [3])
    torch.testing.assert_close(last, golden["mae.plain.output_last"], **CLOSE)
    # and back: what a segmentor adds to a pretrained ViT changes nothing
    published = segmentation_vit(plain, rel_pos_bias=True, layer_scale=True)
    (again,) = published.feature_maps(golden["mae.input"], [3])
    torch.testing.assert_close(again, golden["mae.plain.output_last"], **CLOSE)


def test_beit_has_the_same_blocks(golden: Golden) -> None:
    """Its network is not built; its weights, without positions and with a key bias of zero, are those of ours."""
    weights = part(golden, "beit.weight.")
    q, v = (weights.pop(f"layers.0.attn.{x}_bias") for x in "qv")
    weights |= {"layers.0.attn.qkv.bias": torch.cat([q, torch.zeros_like(q), v]), "pos_embed": torch.zeros(1, 17, 48)}
    (found,) = vit_of(weights, (64, 64)).feature_maps(golden["beit.input"], [0])
    torch.testing.assert_close(found, golden["beit.output0"], **CLOSE)


@pytest.mark.parametrize("case", ["native", "other"])
def test_mmsegmentations_plain_vit(golden: Golden, case: str) -> None:
    """Nor is this one built; ours with a patch bias of zero does the same at any size, the norm on the last map."""
    weights = {name.replace("attn.attn.in_proj_", "attn.qkv.").replace("attn.attn.out_", "attn."): tensor
               for name, tensor in part(golden, "vit.weight.").items()}  # fmt: skip
    norm = {f"norm.{leaf}": weights.pop(f"ln1.{leaf}") for leaf in ("weight", "bias")}
    weights["patch_embed.projection.bias"] = torch.zeros(48)
    vit = vit_of(weights, (64, 64), rel_pos_bias=False, layer_scale=False)
    first, last = vit.feature_maps(golden[f"vit.{case}.input"], [0, 1])
    torch.testing.assert_close(first, golden[f"vit.{case}.output0"], **CLOSE)
    normed = torch.layer_norm(last.permute(0, 2, 3, 1), (48,), norm["norm.weight"], norm["norm.bias"], 1e-6)
    torch.testing.assert_close(normed.permute(0, 3, 1, 2), golden[f"vit.{case}.output1"], **CLOSE)


def test_resized_positions(shared: Path) -> None:
    golden, _ = read_golden(shared / "golden", "segmentation_pos_embed")
    grids = {"14_to_10": ((14, 14), (10, 10)), "14_to_32": ((14, 14), (32, 32)), "4x4_to_5x7": ((4, 4), (5, 7)),
             "6x4_to_3x9": ((6, 4), (3, 9))}  # fmt: skip
    assert {key.partition(".")[0] for key in golden} == grids.keys()
    for case, (old, new) in grids.items():
        found = resize_pos_embed(golden[f"{case}.input"], old, new)
        torch.testing.assert_close(found, golden[f"{case}.output"], atol=1e-5, rtol=0)


def test_relative_position_index(shared: Path) -> None:
    golden, _ = read_golden(shared / "golden", "segmentation_rel_index")
    for size in ("1x1", "2x3", "3x5", "4x4", "32x32", "40x40"):
        rows, columns = map(int, size.split("x"))
        index = relative_position_index((rows, columns))
        assert index.max() + 1 == num_distances((rows, columns)) or size == "1x1"
        if f"{size}.index" in golden:
            assert torch.equal(index, golden[f"{size}.index"].long())
            continue
        assert num_distances((rows, columns)) == golden[f"{size}.rows"] and index.sum() == golden[f"{size}.sum"]
        query, key = golden[f"{size}.position"].long().unbind(1)
        assert torch.equal(index[query, key], golden[f"{size}.value"].long())
        assert torch.equal(index.sum(dim=1) % 65536, golden[f"{size}.row_sums_mod_65536"].long())


# ---- what must hold besides -----------------------------------------------------------------------------------------


def test_the_bias_of_a_pair_is_that_of_its_distance() -> None:
    """Attention by hand, in a loop over pairs."""
    vit = randomized(ViTConfig(**TINY, rel_pos_bias=True))
    attention, N = vit.blocks[0].attn, 1 + 2 * 3
    x = torch.randn(1, N, 24, generator=torch.Generator().manual_seed(1))
    q, k, v = attention.qkv(x).view(N, 3, 3, 8).permute(1, 2, 0, 3)  # each [heads, N, d]
    bias = torch.zeros(3, N, N)
    table, last = attention.relative_position_bias_table, num_distances((2, 3)) - 1
    for a in range(N):
        for b in range(N):
            (i, j), (m, n) = divmod(a - 1, 3), divmod(b - 1, 3)
            row = (i - m + 1) * 5 + j - n + 2
            row = last if a == b == 0 else last - 2 if a == 0 else last - 1 if b == 0 else row
            bias[:, a, b] = table[row]
    out = ((q @ k.mT / 8**0.5 + bias).softmax(dim=-1) @ v).transpose(0, 1).flatten(1)
    torch.testing.assert_close(attention(x)[0], attention.proj(out))
    torch.testing.assert_close(attention(x, num_queries=4), attention(x)[:, -4:])


def test_every_new_tensor_has_a_gradient_also_with_recomputed_blocks() -> None:
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        vit = randomized(ViTConfig(**TINY, rel_pos_bias=True, layer_scale=True, final_norm=False))
        vit.checkpointing = checkpointing
        vit.feature_maps(images, [0, 1])[1].square().sum().backward()
        gradients.append({name: p.grad for name, p in vit.named_parameters()})
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_state_and_results_of_other_vits_are_as_before() -> None:
    names = ViT(ViTConfig(**TINY)).state_dict().keys()
    published = ViT(ViTConfig(**TINY, rel_pos_bias=True, layer_scale=True)).state_dict().keys()
    added = {name.rpartition(".")[2] for name in published - names}
    assert added == {"gamma_1", "gamma_2", "relative_position_bias_table"} and not names - published
    assert names - ViT(ViTConfig(**TINY, final_norm=False)).state_dict().keys() == {"norm.weight", "norm.bias"}


def test_published_blocks() -> None:
    assert published_blocks(12) == (3, 5, 7, 11) and published_blocks(24) == (7, 11, 15, 23)
    assert published_blocks(4) == (0, 1, 2, 3) and published_blocks(1) == (0, 0, 0, 0)


def test_what_a_bias_does_not_go_with() -> None:
    with pytest.raises(ValidationError, match="rel_pos_bias: knows a class token"):
        ViTConfig(**TINY, rel_pos_bias=True, class_token=False)
    vit = ViT(ViTConfig(**TINY, rel_pos_bias=True))
    with pytest.raises(ValueError, match="rel_pos_bias is made for 2x3 patches, the images have 3x3"):
        vit.feature_maps(torch.zeros(1, 3, 48, 48), [0])
    with pytest.raises(ValueError, match="ids_keep must be None"):
        vit.tokens(torch.zeros(1, 3, 32, 48), torch.zeros(1, 2, dtype=torch.int64))
