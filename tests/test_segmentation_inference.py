"""From windows to labels, and from labels to scores: golden values of mmsegmentation, equivalences, refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from core.vit import ViT, ViTConfig
from tests.segmentation_golden import load_golden, part, segmentor_of
from transfer.segmentation.linear_head import LinearSegmentor
from transfer.segmentation.miou import confusion_matrix, scores_of
from transfer.segmentation.resizing import CoarseLogits, resize
from transfer.segmentation.segmentor import LabelsConfig, Segmentor, SegmentorConfig, build_segmentor, segmentation_vit
from transfer.segmentation.slide import (
    BLOCK_PX,
    HasLogits,
    ImageScores,
    InferenceConfig,
    image_labels,
    image_scores,
    labels_of,
    window_starts,
)

SLIDE, WHOLE = InferenceConfig(crop=64, stride=43), InferenceConfig(mode="whole")
SCORES = {"atol": 1e-3, "rtol": 0.0}


def tiny_vit(**changes: bool) -> ViT:
    vit = ViT(ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=16, depth=4, num_heads=2))
    vit.init_weights(torch.Generator().manual_seed(0))
    return segmentation_vit(vit, **{"rel_pos_bias": False, "layer_scale": False, **changes})


def tiny_segmentor(**changes: bool) -> Segmentor:
    model = build_segmentor(tiny_vit(**changes), SegmentorConfig(num_classes=5, channels=8, aux_channels=4))
    model.init_weights(torch.Generator().manual_seed(1))
    return model.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def full(scores: ImageScores) -> Tensor:
    """All scores at once, [B, K, H, W]."""
    B, H, W, K = len(scores.values), len(scores.rows), len(scores.columns), scores.values.shape[-1]
    whole = torch.full((B, H, W, K), torch.nan)
    for rows, columns, block in scores.blocks():
        whole[:, rows, columns] = block
    return whole.permute(0, 3, 1, 2)


def image_logits(model: HasLogits, images: Tensor, config: InferenceConfig = WHOLE) -> Tensor:
    return full(image_scores(model, images, config))


def scores_at_size(values: Tensor) -> ImageScores:
    """Scores [B, K, H, W] that are those of pixels already."""
    return ImageScores(values.permute(0, 2, 3, 1), torch.eye(values.shape[2]), torch.eye(values.shape[3]))


# ---- golden values --------------------------------------------------------------------------------------------------


def test_windows(shared: Path) -> None:
    golden, _ = load_golden(shared, "slide")
    expected: dict[tuple[int, ...], list[list[int]]] = {}
    for row in golden["windows"].tolist():
        expected.setdefault(tuple(row[:4]), []).append(row[4:])
    assert len(expected) == 7
    for (crop, stride, height, width), windows in expected.items():
        tops, lefts = window_starts(height, crop, stride), window_starts(width, crop, stride)
        assert [[top, left, crop, crop] for top in tops for left in lefts] == windows


def test_sliding_window(shared: Path) -> None:
    golden, meta = load_golden(shared, "slide")
    model = segmentor_of(golden, meta)
    first = image_logits(model, golden["input.wide"][..., :64])
    torch.testing.assert_close(first[:, :, ::2, ::2], golden["first_window.logits_every_second"], **SCORES)
    for case in ("wide", "tall"):
        scores = image_logits(model, golden[f"input.{case}"], SLIDE)
        torch.testing.assert_close(scores[:, :, ::2, ::2], golden[f"{case}.logits_every_second"], **SCORES)
    size = tuple(meta["config"]["final_size"])
    final = full(image_scores(model, golden["input.wide"], SLIDE).at(size))
    torch.testing.assert_close(final[0, :, ::2, ::2], golden["wide.final_logits_every_second"], **SCORES)
    prediction = image_labels(model, [golden["input.wide"]], size, SLIDE)
    assert torch.equal(prediction[0], golden["wide.prediction"].long())


def test_merged_views(shared: Path) -> None:
    golden, _ = load_golden(shared, "slide")
    views = [scores_at_size(golden[f"merge.input{i}"]) for i in range(4)]
    found = labels_of([(view.mirrored() if i % 2 else view).at((25, 36)) for i, view in enumerate(views)])[0]
    decided = golden["merge.undecided"] == 0
    assert decided.float().mean() > 0.9
    assert torch.equal(found[decided], golden["merge.prediction"].long()[decided])


@pytest.mark.parametrize("case", ["toy", "two_images"])
def test_metric(shared: Path, case: str) -> None:
    golden, meta = load_golden(shared, "metric")
    expected, ignore_index = part(golden, f"{case}."), meta["config"]["ignore_index"]
    pairs = zip(expected["prediction"], expected["label"], strict=True)
    confusion = sum(confusion_matrix(prediction, label, 6, ignore_index) for prediction, label in pairs)
    assert confusion.dtype == torch.int64
    counts = {
        "intersection": confusion.diagonal(),
        "label_pixels": confusion.sum(1),
        "prediction_pixels": confusion.sum(0),
    }
    counts["union"] = counts["label_pixels"] + counts["prediction_pixels"] - counts["intersection"]
    for name, count in counts.items():
        assert torch.equal(count, expected[name].long())
    scores = scores_of(confusion)
    close = {"atol": 1e-5, "rtol": 0, "equal_nan": True}
    torch.testing.assert_close(scores.iou, expected["IoU"], **close)
    torch.testing.assert_close(scores.acc, expected["Acc"], **close)
    assert scores.aacc == pytest.approx(float(expected["aAcc"]), abs=1e-5)
    for found, name in ((scores.aacc, "aAcc"), (scores.miou, "mIoU"), (scores.macc, "mAcc")):
        assert np.round(100 * found, 2) == pytest.approx(float(expected[f"rounded.{name}"]), abs=1e-5)


# ---- equivalences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 70), (45, 40), (20, 50)])
def test_windows_in_batches_are_windows_one_by_one(size: tuple[int, int]) -> None:
    model, images = tiny_segmentor(), noise(2, 3, *size)
    config = InferenceConfig(crop=32, stride=20, window_batch_size=3)
    together = image_logits(model, images, config)
    one_by_one = image_logits(model, images, config.model_copy(update={"window_batch_size": 1}))
    torch.testing.assert_close(together, one_by_one, atol=1e-5, rtol=1e-4)
    for i in range(2):
        torch.testing.assert_close(
            together[i : i + 1], image_logits(model, images[i : i + 1], config), atol=1e-5, rtol=1e-4
        )


def test_every_pixel_has_the_mean_of_its_windows() -> None:
    class Columns:
        """Scores a window by the value of its first pixel."""

        def logits(self, images: Tensor) -> CoarseLogits:
            return CoarseLogits(images[:, :1, :1, :1].expand(-1, 2, 2, 2), (images.shape[2], images.shape[3]))

    image = torch.arange(10.0).expand(1, 3, 4, 10)
    found = image_logits(Columns(), image, InferenceConfig(crop=4, stride=3))  # windows begin at 0, 3, 6
    assert window_starts(10, 4, 3) == [0, 3, 6]
    assert found[0, 0, 0].tolist() == [0, 0, 0, 1.5, 3, 3, 4.5, 6, 6, 6]


def test_a_whole_image_is_one_window() -> None:
    model, images = tiny_segmentor(), noise(1, 3, 40, 56)
    slid = image_logits(model, images, InferenceConfig(crop=64, stride=43))
    assert torch.equal(slid, image_logits(model, images))


def test_images_of_any_size_are_padded_and_their_scores_cut() -> None:
    model, image = tiny_segmentor(), noise(1, 3, 37, 61)
    expected = image_logits(model, torch.nn.functional.pad(image, (0, 3, 0, 3)))
    torch.testing.assert_close(image_logits(model, image), expected[:, :, :37, :61])
    assert image_logits(model, noise(1, 3, 3, 5)).shape == (1, 5, 3, 5)  # smaller than a patch


def test_relative_position_bias_has_one_size() -> None:
    model, image = tiny_segmentor(rel_pos_bias=True), noise(1, 3, 20, 30)
    expected = image_logits(model, torch.nn.functional.pad(image, (0, 2, 0, 12)))
    torch.testing.assert_close(image_logits(model, image), expected[:, :, :20, :30])
    assert image_logits(model, noise(1, 3, 40, 50), InferenceConfig(crop=32, stride=20)).shape == (1, 5, 40, 50)
    with pytest.raises(ValueError, match="image of 40x50 px: relative position bias is made for 32x32; slide a window"):
        image_logits(model, noise(1, 3, 40, 50))


@pytest.mark.parametrize("size", [(40, 150), (64, 100), (23, 61)])
def test_scores_in_blocks_are_those_of_plain_windows(size: tuple[int, int]) -> None:
    model, images = tiny_segmentor(), noise(2, 3, 40, 150)
    config = InferenceConfig(crop=32, stride=20, window_batch_size=5)
    total, count = torch.zeros(2, 5, 40, 150), torch.zeros(40, 150)
    for top in window_starts(40, 32, 20):
        for left in window_starts(150, 32, 20):
            values, span = model.logits(images[:, :, top : top + 32, left : left + 32])
            total[:, :, top : top + 32, left : left + 32] += resize(values, span)
            count[top : top + 32, left : left + 32] += 1
    expected = resize(total / count, size)
    scores = image_scores(model, images, config).at(size)
    assert sum(1 for _ in scores.blocks()) == -(-size[0] // BLOCK_PX["cpu"]) * -(-size[1] // BLOCK_PX["cpu"])
    torch.testing.assert_close(full(scores), expected)
    highest = expected.topk(2, dim=1).values
    decided = highest[:, 0] - highest[:, 1] > 1e-5
    assert decided.float().mean() > 0.9
    assert torch.equal(image_labels(model, [images], size, config)[decided], expected.argmax(dim=1)[decided])


def test_scores_stay_float32_under_autocast() -> None:
    scores = image_scores(tiny_segmentor(), noise(1, 3, 40, 56), WHOLE).at((64, 70))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(full(scores), full(scores))
        assert all(block.dtype == torch.float32 for _, _, block in scores.blocks())


def test_views_are_merged_as_mean_probabilities() -> None:
    model, images, size = tiny_segmentor(), noise(1, 3, 32, 48), (30, 45)
    views = [images, noise(1, 3, 48, 64)]
    expected = sum(
        resize(image_logits(model, x), size).softmax(dim=1) + resize(image_logits(model, x.flip(-1)).flip(-1), size).softmax(dim=1)
        for x in views
    )  # fmt: skip
    assert torch.equal(image_labels(model, views, size, WHOLE, flip=True), expected.argmax(dim=1))
    mirrored = image_labels(model, [x.flip(-1) for x in views], size, WHOLE, flip=True)
    assert torch.equal(mirrored.flip(-1), expected.argmax(dim=1))
    single = image_labels(model, views[:1], size, WHOLE)
    assert torch.equal(single, resize(image_logits(model, images), size).argmax(dim=1))
    assert not torch.equal(single, expected.argmax(dim=1))


def test_the_linear_head_is_a_linear_map_of_normed_tokens() -> None:
    vit = ViT(ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=16, depth=2, num_heads=2))
    vit.init_weights(torch.Generator().manual_seed(0))
    model = LinearSegmentor(vit, LabelsConfig(num_classes=5))
    model.init_weights(torch.Generator().manual_seed(1))
    images, labels = noise(2, 3, 32, 32), torch.arange(2 * 32 * 32).view(2, 32, 32) % 5
    tokens = vit.tokens(images)[:, 1:]  # [B, L, D]
    normed = torch.nn.functional.batch_norm(tokens.flatten(0, 1), None, None, training=True)
    scores = normed @ model.head.conv_seg.weight.flatten(1).T + model.head.conv_seg.bias  # [B * L, K]
    maps = scores.view(2, 4, 4, 5).permute(0, 3, 1, 2)
    expected = torch.nn.functional.cross_entropy(resize(maps, (32, 32)), labels)
    (loss,) = model.train().losses(images, labels).values()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "head.conv_seg.weight",
        "head.conv_seg.bias",
    }
    assert image_logits(model.eval(), noise(1, 3, 21, 50)).shape == (1, 5, 21, 50)


def test_a_set_may_be_counted_in_any_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, predictions = (torch.randint(0, 4, (6, 9, 7), generator=generator) for _ in range(2))
    labels[0, :3] = 255
    whole = confusion_matrix(predictions.byte(), labels.byte(), 4, 255)
    parts = [confusion_matrix(p, label, 4, 255) for p, label in zip(predictions, labels, strict=True)]
    assert torch.equal(torch.stack(parts).sum(dim=0), whole) and whole.sum() == (labels != 255).sum()
    for row in range(4):
        for column in range(4):
            assert whole[row, column] == ((labels == row) & (predictions == column)).sum()


def test_a_table_of_classes() -> None:
    scores = scores_of(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 0]]))
    assert scores.table(["road", "a car", "sky"]) == [
        "class   IoU %   acc %        pixels",
        "road    75.00   75.00             4",
        "a car    0.00       -             0",
        "sky         -       -             0",
    ]
    assert (scores.miou, scores.macc, scores.aacc) == (0.375, 0.75, 0.75)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [4, 5, 200])
def test_labels_out_of_range_are_named(label: int) -> None:
    labels = torch.tensor([[0, label, 255]])
    with pytest.raises(ValueError, match=rf"a label of {label}, expected 0\.\.3 or 255"):
        confusion_matrix(torch.zeros_like(labels), labels, 4, 255)


def test_predictions_and_labels_of_one_size() -> None:
    with pytest.raises(ValueError, match=r"predictions \[2, 3\], labels \[3, 2\]"):
        confusion_matrix(torch.zeros(2, 3), torch.zeros(3, 2), 4, 255)


def test_windows_leave_no_gaps() -> None:
    with pytest.raises(ValidationError, match="stride=65: beyond crop=64"):
        InferenceConfig(crop=64, stride=65)
    with pytest.raises(ValueError, match="no views"):
        labels_of([])
