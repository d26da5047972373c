"""The segmentor directory: what is stored comes back, strictly; what all model directories have in common."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core.errors import CheckpointError, NumericError
from core.model_directory import kind_of
from core.vit import ViT, ViTConfig
from tests.test_segmentation_inference import WHOLE, noise, tiny_segmentor, tiny_vit
from transfer.segmentation.classes import Classes
from transfer.segmentation.directory import export_segmentor, load_segmentor
from transfer.segmentation.labels import LabelKeys
from transfer.segmentation.linear_head import LinearSegmentor, Network
from transfer.segmentation.segmentor import LabelsConfig
from transfer.segmentation.slide import InferenceConfig, image_labels

CLASSES = Classes(("sky", "a wall", "Gebäude", "5", "car"), ((1, 2, 3), (255, 0, 0), (0, 0, 0), (9, 9, 9), (1, 2, 3)))
LABELS = LabelKeys(classes="somewhere.txt", ignore_index=250, label_map={11: 0, 12: 250, 200: 4})
WINDOWS = InferenceConfig(crop=32, stride=20, window_batch_size=3)


def linear_segmentor() -> LinearSegmentor:
    vit = ViT(ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=16, depth=2, num_heads=2))
    vit.init_weights(torch.Generator().manual_seed(0))
    model = LinearSegmentor(vit, LabelsConfig(num_classes=5, ignore_index=250, average="valid_pixels"))
    model.init_weights(torch.Generator().manual_seed(1))
    return model


def export(folder: Path, model: Network) -> Path:
    export_segmentor(folder, model, CLASSES, LABELS, (128, 32), WINDOWS, {"step": 7, "config": "abc"})
    return folder


MODELS: dict[str, Callable[[], Network]] = {
    "upernet": tiny_segmentor,
    "published": lambda: tiny_segmentor(rel_pos_bias=True, layer_scale=True),
    "linear": linear_segmentor,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_segmentor_comes_back(tmp_path: Path, name: str) -> None:
    model = MODELS[name]()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2, generator=torch.Generator().manual_seed(3))
    loaded = load_segmentor(export(tmp_path / "new" / "segmentor", model))
    assert type(loaded.model) is type(model) and not loaded.model.training
    assert loaded.model.config == model.config and loaded.model.backbone.config == model.backbone.config
    assert loaded.head == ("linear" if name == "linear" else "upernet")
    assert loaded.classes == CLASSES and loaded.scale == (128, 32) and loaded.inference == WINDOWS
    assert loaded.labels == LABELS.model_copy(update={"classes": None, "num_classes": 5})
    assert loaded.provenance == {"step": 7, "config": "abc"}
    stored, expected = loaded.model.state_dict(), model.state_dict()
    assert stored.keys() == expected.keys() and all(torch.equal(stored[key], expected[key]) for key in expected)
    images = noise(1, 3, 32, 70)
    labels = [image_labels(m, [images], (40, 80), WINDOWS) for m in (loaded.model, model.eval())]
    assert torch.equal(*labels)
    assert kind_of(tmp_path / "new" / "segmentor") == "segmentor" and kind_of(tmp_path) is None


def test_it_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = export(tmp_path / "segmentor", linear_segmentor())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(before) == ["config.json", "model.safetensors"]
    with pytest.raises(TypeError):
        export_segmentor(folder, linear_segmentor(), CLASSES, LABELS, (128, 32), WINDOWS, {"step": {1}})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["segmentor"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda ours: ours.pop("scale"), "not a segmentor's description: 'scale'"),
        (lambda ours: ours.update(kind="detector"), "it describes a detector"),
        (lambda ours: ours.update(head="fcn"), "not a segmentor's description: 'fcn'"),
        (lambda ours: ours.update(scale=[32, 128]), r"scale: expected \(long, short\) sides in pixels, got 32, 128"),
        (lambda ours: ours["names"].pop(), "5 classes, 4 names, 5 colours"),
        (lambda ours: ours["palette"][0].append(3), "too many values to unpack"),
        (lambda ours: ours["palette"][1].__setitem__(2, 256), r"palette: expected colours of 0\.\.255"),
        (lambda ours: ours["labels"].update(label_map={"3": 5}), "label_map: 3: 5 is no class"),
        (lambda ours: ours["labels"].update(other=1), "1 validation error for LabelKeys"),
        (lambda ours: ours["inference"].update(stride=33), "1 validation error for InferenceConfig"),
        (
            lambda ours: ours["segmentor"].update(blocks=[0, 1, 2, 4]),
            r"blocks=\[0, 1, 2, 4\]: the backbone has 4 blocks",
        ),
        (lambda ours: ours["vit"].update(final_norm=True), "the backbone has a final norm"),
        (lambda ours: ours["vit"].update(depth=5), "Missing key"),
        (lambda ours: ours["segmentor"].update(channels=9), "size mismatch"),
    ],
)
def test_a_segmentor_that_is_none(tmp_path: Path, change: Callable[[dict[str, Any]], object], line: str) -> None:
    folder = export(tmp_path / "segmentor", tiny_segmentor())
    description = json.loads((folder / "config.json").read_text())
    change(description["rcmae"])
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=line) as caught:
        load_segmentor(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_folders_and_weights_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no segmentor directory; expected model\.safetensors and config\.json"):
        load_segmentor(tmp_path)
    model = tiny_segmentor()
    nn.init.constant_(model.decode_head.conv_seg.bias, torch.nan)
    with pytest.raises(NumericError, match=r"decode_head\.conv_seg\.bias holds non-finite values"):
        load_segmentor(export(tmp_path / "segmentor", model))
    (tmp_path / "segmentor" / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not a segmentor's description"):
        load_segmentor(tmp_path / "segmentor")
    assert kind_of(tmp_path / "segmentor") is None
    for text in ('{"rcmae": {"kind": ["segmentor"]}}', '{"rcmae": 3}', "[]"):
        (tmp_path / "segmentor" / "config.json").write_text(text)
        assert kind_of(tmp_path / "segmentor") is None


def test_a_plain_vit_takes_images_of_any_size_afterwards(tmp_path: Path) -> None:
    loaded = load_segmentor(export(tmp_path / "segmentor", tiny_segmentor()))
    assert image_labels(loaded.model, [noise(1, 3, 19, 45)], (19, 45), WHOLE).shape == (1, 19, 45)
    assert tiny_vit().config == loaded.model.backbone.config
