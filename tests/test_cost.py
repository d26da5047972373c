"""Costs before a run, against the tables of the method's spec (sections 1 and 7) and against built models."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core.vit import ViTConfig
from pretrain.cost import checkpoint_bytes, forward_flops, num_parameters, step_flops
from pretrain.mae import DecoderConfig, MaskedAutoencoder
from pretrain.presets import ENCODERS, preset
from tools.plain_step import PlainMAE

PARAMETERS = {  # encoder, decoder
    "tiny": (5_486_592, 520_704), "small": (21_590_016, 3_455_744), "base": (85_647_360, 26_008_320),
    "large": (303_099_904, 26_139_392), "huge": (630_435_840, 26_178_124),
}  # fmt: skip
GFLOP = {  # one forward pass, one MAE step, one RC-MAE step
    "tiny": (0.848, 2.48, 3.33), "small": (3.771, 11.20, 14.97), "base": (19.562, 58.46, 78.02),
    "large": (41.512, 124.23, 165.74), "huge": (97.124, 290.99, 388.11),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters_and_flops_of_the_published_sizes(name: str) -> None:
    vit, decoder = preset(name)
    assert num_parameters(vit, decoder) == PARAMETERS[name]
    forward, mae, rc_mae = GFLOP[name]
    assert sum(forward_flops(vit, decoder, 0.75).values()) / 1e9 == pytest.approx(forward, abs=6e-4)
    assert step_flops(vit, decoder, 0.75, with_teacher=False) / 1e9 == pytest.approx(mae, abs=6e-3)
    assert step_flops(vit, decoder, 0.75, with_teacher=True) / 1e9 == pytest.approx(rc_mae, abs=6e-3)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_built_models_have_these_parameters(name: str) -> None:
    model = MaskedAutoencoder(*preset(name))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == sum(PARAMETERS[name])
    stored = (
        sum(p.numel() for p in model.parameters())
        + 3 * trainable
        + (model.pos_embed.numel() + model.decoder_pos_embed.numel())
    )
    assert checkpoint_bytes(*preset(name), with_teacher=True) == 4 * stored


def test_flops_equal_what_torch_counts_in_the_plain_twin() -> None:
    vit = ViTConfig(img_size=(32, 48), patch_size=8, embed_dim=48, depth=3, num_heads=3, mlp_ratio=3.0)
    decoder = DecoderConfig(embed_dim=24, depth=2, num_heads=2)
    with FlopCounterMode(display=False) as counter:
        PlainMAE(vit, decoder)(torch.rand(1, 3, 32, 48), torch.arange(24)[None], 6)
    # the twin predicts from all L + 1 rows, as the published count does
    assert counter.get_total_flops() == sum(forward_flops(vit, decoder, 0.75).values())
