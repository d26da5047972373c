"""Boxes, anchors, matching, sampling, pooling: golden values of detectron2, and what must hold besides."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.golden_files import require
from tools.verify import detection_boxes
from tools.verify.detection_reference import STRIDES
from tools.verify.golden import FOLDER
from tools.verify.measure import Measure
from transfer.detection.boxes import BoxCoder, clip, nonempty, pairwise_iou, scale
from transfer.detection.matching import random_permutation, sample
from transfer.detection.pooling import RoiPooler
from transfer.detection.pyramid import strides_of
from transfer.detection.rpn import MATCHER

# ---- golden values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compared",
    [detection_boxes.anchors, detection_boxes.box_coder, detection_boxes.matching, detection_boxes.pooling],
    ids=lambda compared: compared.__name__,
)
def test_golden(compared: Callable[[Path], Iterator[Measure]]) -> None:
    require(compared(FOLDER))


# ---- what must hold besides -----------------------------------------------------------------------------------------


def random_boxes(n: int, seed: int = 0, side: float = 100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * side
    return torch.cat([corner, corner + 1 + torch.rand(n, 2, generator=generator) * side], dim=1)


def test_deltas_lead_to_their_target() -> None:
    source, target = random_boxes(20, 0), random_boxes(20, 1)
    coder = BoxCoder((10, 10, 5, 5))
    torch.testing.assert_close(coder.decode(coder.encode(source, target), source), target, atol=1e-4, rtol=1e-5)


def test_a_box_grows_by_at_most_1000_over_16_and_may_shrink_to_nothing() -> None:
    coder = BoxCoder((1, 1, 1, 1))
    box = torch.tensor([[0.0, 0, 16, 16]])
    grown = coder.decode(torch.tensor([[0.0, 0, 1e4, 1e4]]), box)
    torch.testing.assert_close(grown[0, 2:] - grown[0, :2], torch.tensor([1000.0, 1000]))
    shrunk = coder.decode(torch.tensor([[0.0, 0, -1e4, -1e4]]), box)
    assert not nonempty(shrunk)[0] and shrunk.isfinite().all()


def test_boxes_are_decoded_in_float32() -> None:
    decoded = BoxCoder((1, 1, 1, 1)).decode(torch.zeros(1, 4, dtype=torch.bfloat16), torch.tensor([[0, 0, 1001.0, 3]]))
    assert decoded.dtype == torch.float32 and decoded.tolist() == [[0, 0, 1001, 3]]


def test_boxes_are_clipped_to_their_own_image() -> None:
    boxes = torch.tensor([[[-5.0, -5, 50, 60], [10, 20, 30, 40]]] * 2)
    sizes = torch.tensor([[20, 30], [100, 25]])
    expected = [[[0, 0, 30, 20], [10, 20, 30, 20]], [[0, 0, 25, 60], [10, 20, 25, 40]]]
    clipped = clip(boxes, sizes.unsqueeze(1))
    assert clipped.tolist() == expected
    assert nonempty(clipped).tolist() == [[True, False], [True, True]]


def test_scaled_boxes() -> None:
    assert scale(torch.tensor([[1.0, 2, 3, 4]]), (10, 20), (30, 10)).tolist() == [[0.5, 6, 1.5, 12]]


def test_iou_of_boxes_without_area_and_of_nothing() -> None:
    point, box = torch.zeros(1, 4), torch.tensor([[0.0, 0, 2, 2]])
    assert pairwise_iou(point, torch.cat([point, box])).tolist() == [[0, 0]]
    assert pairwise_iou(box, box).tolist() == [[1]]
    assert pairwise_iou(point[:0], box).shape == (0, 1)


def test_iou_of_stacked_boxes_is_that_of_each_stack() -> None:
    a, b = random_boxes(6).view(2, 3, 4), random_boxes(8, 1).view(2, 4, 4)
    stacked = pairwise_iou(a, b)
    assert all(torch.equal(stacked[i], pairwise_iou(a[i], b[i])) for i in range(2))


def test_low_quality_matches_keep_their_own_best_ground_truth() -> None:
    iou = torch.tensor(
        [[0.6, 0.65, 0.64], [0.5, 0.4, 0.2]]
    )  # box 0 is the best that truth 1 has; truth 0 is better for it
    index, labels = MATCHER(iou)
    assert index.tolist() == [0, 0, 0] and labels.tolist() == [1, 1, -1]


def test_samples_are_drawn_from_the_generator_given() -> None:
    labels = torch.tensor([1] * 50 + [0] * 200 + [-1] * 50)
    before = torch.random.get_rng_state()
    drawn = [sample(labels, 32, 0.5, 0, random_permutation(torch.Generator().manual_seed(s))) for s in (3, 3, 4)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][1], drawn[2][1])
    assert all(len(set(rows.tolist())) == 16 for rows in drawn[0])


def test_regions_of_no_size_are_pooled_from_the_finest_map() -> None:
    assert RoiPooler(STRIDES).assign_levels(torch.zeros(1, 4)).tolist() == [2]


def test_levels_follow_the_patch_side() -> None:
    boxes = random_boxes(100, side=600)
    assert strides_of(8) == (2, 4, 8, 16, 32)
    assert torch.equal(RoiPooler(strides_of(8)).assign_levels(boxes / 2), RoiPooler(STRIDES).assign_levels(boxes))
    with pytest.raises(ValueError, match="patch_size=14"):
        strides_of(14)


def test_no_regions_are_pooled_to_nothing_with_a_gradient() -> None:
    features = [torch.ones(1, 3, 2 * s, 2 * s, requires_grad=True) for s in (8, 4, 2, 1)]
    pooled = RoiPooler(STRIDES)(features, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 7)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert all(feature.grad is not None and not feature.grad.any() for feature in features)


def test_sizes_of_anchors() -> None:
    for box in torch.tensor(detection_boxes.ANCHORS.cell_anchors(2)):
        width, height = box[2] - box[0], box[3] - box[1]
        assert math.isclose(width * height, 128**2, rel_tol=1e-6)
