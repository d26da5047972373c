"""From windows to labels, and from labels to scores: golden values of mmsegmentation, equivalences, refusals."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from core.vit import ViT, ViTConfig
from tests.golden_files import require
from tools.verify.golden import FOLDER, read_golden
from tools.verify.measure import Measure
from tools.verify.segmentation_model import WHOLE, image_logits, sliding_window, whole_scores
from tools.verify.segmentation_parts import metric
from transfer.segmentation.linear_head import LinearSegmentor
from transfer.segmentation.miou import confusion_matrix, scores_of
from transfer.segmentation.resizing import CoarseLogits, resize
from transfer.segmentation.segmentor import LabelsConfig, Segmentor, SegmentorConfig, build_segmentor, segmentation_vit
from transfer.segmentation.slide import (
    BLOCK_PX,
    InferenceConfig,
    image_labels,
    image_scores,
    labels_of,
    window_starts,
)


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


# ---- golden values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compared", [sliding_window, metric], ids=["sliding_window", "metric"])
def test_golden(compared: Callable[[Path], Iterator[Measure]]) -> None:
    require(compared(FOLDER))


def test_most_pixels_of_merged_views_are_compared() -> None:
    golden, _ = read_golden(FOLDER, "segmentation_slide")
    assert (golden["merge.undecided"] == 0).float().mean() > 0.9


def test_confusion_is_counted_in_whole_numbers() -> None:
    golden, _ = read_golden(FOLDER, "segmentation_metric")
    assert confusion_matrix(golden["toy.prediction"], golden["toy.label"], 6, 255).dtype == torch.int64


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
    torch.testing.assert_close(whole_scores(scores), expected)
    highest = expected.topk(2, dim=1).values
    decided = highest[:, 0] - highest[:, 1] > 1e-5
    assert decided.float().mean() > 0.9
    assert torch.equal(image_labels(model, [images], size, config)[decided], expected.argmax(dim=1)[decided])


def test_scores_stay_float32_under_autocast() -> None:
    scores = image_scores(tiny_segmentor(), noise(1, 3, 40, 56), WHOLE).at((64, 70))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole_scores(scores), whole_scores(scores))
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
