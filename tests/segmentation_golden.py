"""Reference results of the segmentor, and networks made from their weights."""

from pathlib import Path
from typing import Any

from torch import Tensor

from core.vit import ViT
from tests.golden_files import Golden, part, read_golden
from transfer.segmentation.segmentor import Segmentor, SegmentorConfig, build_segmentor
from transfer.segmentation.weights import from_mmseg, sizes_of

CLOSE = {"atol": 1e-4, "rtol": 0.0}


def load_golden(shared: Path, name: str) -> tuple[Golden, dict[str, Any]]:
    """Tensors of a file (float16 as float32) and its metadata."""
    return read_golden(shared, f"segmentation_{name}")


def segmentor_of(golden: Golden, meta: dict[str, Any]) -> Segmentor:
    """The reference's segmentor, through the weight converter; in evaluation mode, without dropout."""
    state, _ = from_mmseg(part(golden, "weight."))
    vit_config, found = sizes_of(state)
    assert (found.channels, found.aux_channels) == (meta["config"]["channels"], meta["config"]["aux_channels"])
    config = SegmentorConfig(**{**dict(found), "dropout_ratio": 0.0, "blocks": tuple(meta["config"]["out_indices"])})
    model = build_segmentor(ViT(vit_config), config)
    model.load_state_dict(state)
    return model.eval()


def require_gradients(found: dict[str, Tensor | None], expected: dict[str, float]) -> None:
    """Gradient norms by name, to 1e-2 of (expected + 1e-6)."""
    assert found.keys() == expected.keys()
    for name, norm in expected.items():
        gradient = found[name]
        assert gradient is not None and abs(float(gradient.norm()) - norm) <= 1e-2 * (norm + 1e-6), name
