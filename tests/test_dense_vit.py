"""The ViT of detectors: windows, decomposed relative positions, drop path; against detectron2's and plain formulas."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from core.attention import merge_windows, relative_table, split_windows, with_relative_positions
from core.vit import Block, ViT, ViTConfig
from tests.golden_files import require
from tools.verify.detection_backbone import vit_of, windowed_vit
from tools.verify.golden import FOLDER, read_golden

DENSE = {"class_token": False, "window_size": 3, "global_blocks": (1, 3), "rel_pos_grid": (8, 8)}


def test_blocks_and_vit_are_detectron2s() -> None:
    measures = list(windowed_vit(FOLDER))
    require(measures)
    # one block is nearer than the golden files ask for
    tight = [m for m in measures if m.what.startswith(("attention", "block")) or "positions" in m.what]
    assert len(tight) == 7 and max(m.difference for m in tight) <= 1e-5


@pytest.mark.parametrize("case", ["square", "rectangle"])
def test_recomputed_blocks_change_nothing_and_have_gradients(case: str) -> None:
    golden, meta = read_golden(FOLDER, "detection_vit")
    vit, images = vit_of(golden, meta), golden[f"vit.{case}.input"]
    (last,) = vit.feature_maps(images, [vit.config.depth - 1])
    vit.checkpointing = True
    (again,) = vit.feature_maps(images, [vit.config.depth - 1])
    torch.testing.assert_close(again, last, rtol=0, atol=0)
    again.sum().backward()
    assert vit.blocks[0].attn.rel_pos_h.grad.abs().sum() > 0


@pytest.mark.parametrize("grid", [(5, 7), (14, 14)])
def test_relative_positions_in_channels_equal_a_bias_of_all_pairs(grid: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    N, d = grid[0] * grid[1], 16
    q, k, v = (torch.randn(2, 3, N, d, generator=generator, dtype=torch.float64) for _ in range(3))
    tables = [torch.randn(2 * n - 1, d, generator=generator, dtype=torch.float64) for n in grid]
    to_rows = torch.einsum("bhijd,imd->bhijm", q.unflatten(2, grid), relative_table(tables[0], grid[0]))
    to_columns = torch.einsum("bhijd,jnd->bhijn", q.unflatten(2, grid), relative_table(tables[1], grid[1]))
    bias = to_rows[..., :, None] + to_columns[..., None, :]  # [B, heads, rows, columns, rows, columns]
    logits = q @ k.transpose(2, 3) * d**-0.5 + bias.flatten(4, 5).flatten(2, 3)
    expected = logits.softmax(dim=-1) @ v
    wide_q, wide_k = with_relative_positions(q, k, *tables, grid)
    assert wide_q.shape[-1] % 8 == 0
    found = F.scaled_dot_product_attention(wide_q, wide_k, v, scale=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_windows_come_back() -> None:
    x = torch.randn(2, 5 * 7, 4)
    windows = split_windows(x, (5, 7), 3)
    assert windows.shape == (2 * 2 * 3, 9, 4)
    assert torch.equal(windows[0].view(3, 3, 4), x.view(2, 5, 7, 4)[0, :3, :3])
    assert not windows[2].view(3, 3, 4)[:, 1:].any()  # the padding
    assert torch.equal(merge_windows(windows, (5, 7), 3), x)


def test_a_window_that_covers_the_grid_is_global_attention() -> None:
    windowed, everywhere = Block(16, 2, 4, window_size=6), Block(16, 2, 4)
    everywhere.load_state_dict(windowed.state_dict())
    x = torch.randn(2, 36, 16)
    torch.testing.assert_close(windowed(x, grid=(6, 6)), everywhere(x))


def test_relative_positions_are_zero_at_first_and_change_nothing() -> None:
    sizes = {"img_size": (32, 32), "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}
    dense, plain = ViT(ViTConfig(**sizes, **DENSE)), ViT(ViTConfig(**sizes, **{**DENSE, "rel_pos_grid": None}))
    dense.init_weights(torch.Generator().manual_seed(0))
    missing, unexpected = plain.load_state_dict(dense.state_dict(), strict=False)
    assert not missing and all("rel_pos" in name for name in unexpected) and len(unexpected) == 8
    images = torch.randn(1, 3, 32, 40)
    torch.testing.assert_close(dense.feature_maps(images, [3])[0], plain.feature_maps(images, [3])[0])


@pytest.mark.parametrize(
    ("changes", "line"),
    [({"class_token": True}, "class_token: has no place"), ({"window_size": None}, "global_blocks=.*needs window_size"),
     ({"global_blocks": (4,)}, "blocks below depth=4")],
)  # fmt: skip
def test_sizes_that_cannot_hold_together(changes: dict, line: str) -> None:
    sizes = {"img_size": (32, 32), "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2}
    with pytest.raises(ValidationError, match=line):
        ViTConfig(**sizes, **{**DENSE, **changes})
