"""Heads, mask targets, choice of detections, pasting: golden values of detectron2, and what must hold besides."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.golden_files import require
from tools.verify import detection_heads
from tools.verify.detection_heads import rois_of
from tools.verify.detection_reference import STRIDES, fixed_permutation, no_targets
from tools.verify.golden import FOLDER
from tools.verify.measure import Measure
from transfer.detection.box_head import box_losses
from transfer.detection.boxes import BoxCoder
from transfer.detection.cascade import CODERS, CascadeROIHeads
from transfer.detection.mask_head import mask_loss
from transfer.detection.masks import draw_polygons, mask_targets, paste_masks, pool_bitmaps
from transfer.detection.roi_heads import FIRST_CODER, ROIHeads, ROIHeadsConfig, StandardROIHeads
from transfer.detection.rois import match_rois, sample_rois
from transfer.detection.rpn import Proposals
from transfer.detection.targets import PaddedTruth, Targets

CPU = torch.device("cpu")


# ---- golden values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compared",
    [
        detection_heads.roi_heads,
        detection_heads.mask_targets,
        detection_heads.relabelled,
        detection_heads.selection,
        detection_heads.pasting,
    ],
    ids=lambda compared: compared.__name__,
)
def test_golden(compared: Callable[[Path], Iterator[Measure]]) -> None:
    require(compared(FOLDER))


# ---- what must hold besides -----------------------------------------------------------------------------------------


def square(x: float, y: float, side: float) -> np.ndarray:
    return np.array([x, y, x + side, y, x + side, y + side, x, y + side])


def bitmap_of(x: int, y: int, side: int, size: tuple[int, int] = (64, 64)) -> Tensor:
    bitmap = torch.zeros(size, dtype=torch.uint8)
    bitmap[y : y + side, x : x + side] = 1
    return bitmap


def test_polygons_and_bitmaps_of_one_image_may_be_mixed() -> None:
    boxes = torch.tensor([[8.0, 8, 40, 40], [20, 20, 60, 60], [0, 0, 64, 64]])
    target = Targets(boxes[:2], torch.zeros(2, dtype=torch.int64), [[square(10, 10, 20)], bitmap_of(30, 30, 20)])
    drawn = mask_targets([no_targets(), target], [0, 3], torch.tensor([0, 1, 1]), boxes, 28, CPU)
    assert torch.equal(drawn[0], torch.from_numpy(draw_polygons([square(10, 10, 20)], boxes[0].numpy(), 28)))
    bitmaps = bitmap_of(30, 30, 20)[None]
    assert torch.equal(drawn[1:], pool_bitmaps(bitmaps, torch.zeros(2, dtype=torch.int64), boxes[1:], 28))


def test_both_kinds_of_mask_targets_nearly_agree() -> None:
    boxes = torch.tensor([[5.0, 7, 50, 60], [0, 0, 30, 30]])
    labels, index = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    kinds = [[[square(10, 12, 30)]], [bitmap_of(10, 12, 30)]]
    of_polygon, of_bitmap = (
        mask_targets([Targets(boxes[:1], labels, masks)], [2], index, boxes, 28, CPU) for masks in kinds
    )
    assert of_polygon.any() and (of_polygon != of_bitmap).float().mean() < 0.05


def test_an_instance_without_polygons_is_an_empty_mask() -> None:
    assert not draw_polygons([], np.array([0, 0, 10, 10], dtype=np.float32), 28).any()


def test_pasting_many_at_once_is_pasting_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(12, 2, generator=generator) * 60 - 10
    boxes = torch.cat([corner, corner + 0.3 + torch.rand(12, 2, generator=generator) * 40], dim=1)
    masks = torch.rand(12, 28, 28, generator=generator)
    one_by_one = paste_masks(masks, boxes, (50, 70))
    assert torch.equal(paste_masks(masks, boxes, (50, 70), num_at_once=5), one_by_one)


def test_a_full_mask_is_pasted_as_its_box() -> None:
    pasted = paste_masks(torch.ones(1, 28, 28), torch.tensor([[10.0, 20, 30, 50]]), (64, 64))
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[20:50, 10:30] = True
    assert torch.equal(pasted[0], expected)


def test_no_detections_are_pasted_to_nothing() -> None:
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (8, 9)).shape == (0, 8, 9)


def test_regions_match_the_truth_of_their_own_image() -> None:
    box = torch.tensor([[0.0, 0, 10, 10]])
    twice = Targets(torch.cat([box + 100, box]), torch.tensor([3, 2]), [[], []])
    truth = PaddedTruth.of([twice, no_targets(), Targets(box, torch.tensor([1]), [[]])])
    image = torch.tensor([0, 1, 2, 2])
    rois = match_rois(torch.cat([box, box, box, box + 4]), image, truth, 0.5, 5)
    assert rois.labels.tolist() == [2, 5, 1, 5] and rois.instances.tolist() == [1, 0, 0, 0]
    assert rois.truth_boxes[1].tolist() == [0, 0, 0, 0]


def test_the_truth_takes_part_in_the_sampling_and_objects_come_first() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [30, 30, 60, 60]])
    targets = [Targets(boxes[:1], torch.tensor([1]), [[]]), no_targets()]
    rois = sample_rois(
        [boxes[1:], boxes],
        PaddedTruth.of(targets),
        threshold=0.5,
        num_classes=3,
        batch_size_per_image=2,
        positive_fraction=0.5,
        permutation=fixed_permutation,
    )
    assert rois.num_objects == [1, 0] and rois.all.labels.tolist() == [1, 3, 3, 3]
    assert rois.all.image.tolist() == [0, 0, 1, 1] and rois.all.boxes[:2].tolist() == boxes.tolist()
    assert rois.objects.boxes.tolist() == boxes[:1].tolist()


def test_losses_of_no_regions_are_zero_with_a_graph() -> None:
    scores, deltas = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 12, requires_grad=True)
    rois = rois_of(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    logits = torch.zeros(0, 3, 28, 28, requires_grad=True)
    losses = (*box_losses(scores, deltas, rois, FIRST_CODER), mask_loss(logits, rois.labels, torch.zeros(0, 28, 28)))
    assert all(loss == 0 and loss.requires_grad for loss in losses)


def test_background_pulls_at_no_box() -> None:
    deltas = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 3)
    rois = rois_of(boxes, torch.tensor([1, 2, 2]), torch.tensor([[1.0, 1, 9, 9], [0, 0, 0, 0], [2, 2, 5, 5]]))
    loss_box_reg = box_losses(torch.zeros(3, 3), deltas, rois, FIRST_CODER)[1]
    loss_box_reg.backward()
    assert loss_box_reg.isfinite() and deltas.grad is not None
    assert (deltas.grad != 0).tolist() == [[False] * 4 + [True] * 4, [False] * 8, [False] * 8]


HEADS = [StandardROIHeads, CascadeROIHeads]
TINY = ROIHeadsConfig(
    num_box_convs=1, box_fc_dim=8, num_mask_convs=1, batch_size_per_image=8, score_threshold=0.1, detections_per_image=5
)


def tiny_heads(kind: type[ROIHeads]) -> tuple[ROIHeads, list[Tensor]]:
    """Heads, and features of two images of 64 px."""
    generator = torch.Generator().manual_seed(0)
    heads = kind(TINY, 3, 4, STRIDES)
    heads.init_weights(generator)
    features = [torch.randn(2, 4, n, n, generator=generator).requires_grad_() for n in (16, 8, 4, 2, 1)]
    return heads, features


def proposals_of(*boxes: list[list[float]]) -> list[Proposals]:
    tensors = [torch.tensor(image).view(-1, 4) for image in boxes]
    return [Proposals(image, torch.zeros(len(image))) for image in tensors]


@pytest.mark.parametrize("kind", HEADS)
def test_detections_of_a_batch_are_those_of_its_images(kind: type[ROIHeads]) -> None:
    heads, features = tiny_heads(kind)
    proposals = proposals_of([[0, 0, 30, 40], [5, 5, 20, 60]], [[10, 10, 40, 30], [0, 0, 60, 60], [3, 3, 9, 9]])
    sizes = torch.tensor([[64, 48], [40, 64]])
    together = heads.detect(features, proposals, sizes)
    assert any(len(found.boxes) for found, _ in together)
    for i, (found, masks) in enumerate(together):
        alone = heads.detect([f[i : i + 1] for f in features], proposals[i : i + 1], sizes[i : i + 1])[0]
        torch.testing.assert_close(found.boxes, alone[0].boxes)
        torch.testing.assert_close(found.scores, alone[0].scores)
        assert torch.equal(found.labels, alone[0].labels)
        torch.testing.assert_close(masks, alone[1])


@pytest.mark.parametrize("kind", HEADS)
def test_images_without_proposals_have_no_detections(kind: type[ROIHeads]) -> None:
    heads, features = tiny_heads(kind)
    sizes = torch.tensor([[64, 64], [64, 64]])
    for boxes in ([[], [[0.0, 0, 30, 40]]], [[], []]):
        found, masks = heads.detect(features, proposals_of(*boxes), sizes)[0]
        assert found.boxes.shape == (0, 4) and masks.shape == (0, 28, 28)


@pytest.mark.parametrize("kind", HEADS)
def test_every_weight_has_a_gradient_whatever_the_images_hold(kind: type[ROIHeads]) -> None:
    heads, features = tiny_heads(kind)
    box = torch.tensor([[4.0, 4, 30, 40]])
    full = Targets(box, torch.tensor([1]), [[square(4, 4, 20)]])
    sizes = torch.tensor([[64, 64], [64, 64]])
    for targets in ([full, no_targets()], [no_targets(), no_targets()]):
        for boxes in ([[[0.0, 0, 30, 40]], []], [[], []]):
            heads.zero_grad()
            losses = heads.losses(features, proposals_of(*boxes), targets, sizes, fixed_permutation)
            sum(losses.values()).backward()
            assert all(loss.dtype == torch.float32 and loss.shape == () and loss.isfinite() for loss in losses.values())
            assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())


@pytest.mark.parametrize("kind", HEADS)
def test_losses_are_float32_under_autocast(kind: type[ROIHeads]) -> None:
    heads, features = tiny_heads(kind)
    target = Targets(torch.tensor([[4.0, 4, 30, 40]]), torch.tensor([1]), [bitmap_of(4, 4, 20)])
    given = (features, proposals_of([[0, 0, 30, 40]], []), [target, no_targets()], torch.tensor([[64, 64], [64, 64]]))
    plain = heads.losses(*given, fixed_permutation)
    with torch.autocast("cpu", torch.bfloat16):
        losses = heads.losses(*given, fixed_permutation)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain[name], atol=0.02, rtol=0.02)


def test_a_stage_of_a_cascade_pulls_at_the_features_with_a_third() -> None:
    heads, features = tiny_heads(CascadeROIHeads)
    box = torch.tensor([[4.0, 4, 30, 40]])
    rois = rois_of(box, torch.tensor([1]), box + 2)
    truth = PaddedTruth.of([Targets(box + 2, torch.tensor([1]), [[]]), no_targets()])
    losses = heads.box_losses(features, rois, truth, torch.tensor([[64, 64]] * 2))
    (found,) = torch.autograd.grad(losses["loss_cls_stage0"], features[0])
    scores, deltas = heads.stages[0](heads.pool(features, rois.boxes, rois.image, 7))
    (whole,) = torch.autograd.grad(box_losses(scores, deltas, rois, CODERS[0])[0], features[0])
    assert whole.any()
    torch.testing.assert_close(found, whole / 3)


def test_boxes_of_a_stage_are_no_path_for_gradients() -> None:
    heads, features = tiny_heads(CascadeROIHeads)
    target = Targets(torch.tensor([[4.0, 4, 30, 40]]), torch.tensor([1]), [[square(4, 4, 20)]])
    losses = heads.losses(
        features,
        proposals_of([[0, 0, 30, 40]], []),
        [target, no_targets()],
        torch.tensor([[64, 64]] * 2),
        fixed_permutation,
    )
    losses["loss_box_reg_stage1"].backward()
    assert all(p.grad is None or not p.grad.any() for p in heads.stages[0].parameters())
    assert heads.stages[1].reg.weight.grad.any()


def test_boxes_are_decoded_by_the_coder_of_their_stage() -> None:
    assert [coder.weights for coder in CODERS] == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    assert BoxCoder(CODERS[2].weights).decode(
        torch.tensor([[30.0, 0, 0, 0]]), torch.tensor([[0.0, 0, 8, 8]])
    ).tolist() == [[8, 0, 16, 8]]
